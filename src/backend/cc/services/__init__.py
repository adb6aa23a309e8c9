"""The services of cc."""
