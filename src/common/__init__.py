"""What every COS module shares: the request id and the start of tracing."""
