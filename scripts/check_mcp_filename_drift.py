#!/usr/bin/env python3
"""Check that the MCP tools' and resources' file names have not drifted from what they declare."""


def main() -> None:
    """Do nothing yet."""
    # TODO: Implement full logic in Sprint 4.
    pass


if __name__ == "__main__":
    main()
