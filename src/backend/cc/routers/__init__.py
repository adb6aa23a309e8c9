"""The HTTP routes of cc."""
