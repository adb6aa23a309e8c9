"""The loopback interface. Everything that runs locally listens on it, and on no other interface."""

import socket
from typing import Final

HOST: Final = "127.0.0.1"


def require_free(port: int, remedy: str) -> None:
    """Raise OSError if a port is taken, before anything is started; `remedy` says how to choose another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run do not count
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"{HOST}:{port}: {error.args[-1]}. Another port: {remedy}") from error


def listens(port: int) -> bool:
    """Tell whether a process accepts connections on a port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])
