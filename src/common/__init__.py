"""What every COS module shares: the request id, the start of tracing, and log lines."""
