"""The loopback interface, on which everything that runs locally listens and nothing else."""

import os
import socket
from typing import Final

HOST: Final = "127.0.0.1"

PORTS: Final = range(1, 65_536)


def port_of(variable: str, default: int) -> int:
    """Return the port that an environment variable names.

    Args:
        variable: Its name.
        default: The port where it is absent or empty.

    Raises:
        OSError: It names none.
    """
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal() or int(value) not in PORTS:
        raise OSError(f"{variable} must be a port, 1 to 65535")
    return int(value)


def require_free(port: int, remedy: str) -> None:
    """Refuse a port that is taken before anything is started, and before somebody else's answer on it is announced.

    Args:
        port: On the loopback interface.
        remedy: How to choose another port, for the error.

    Raises:
        OSError: The port cannot be listened on.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run do not count
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(f"{HOST}:{port}: {error.strerror}. Another port: {remedy}") from error


def listens(port: int) -> bool:
    """Tell whether a process accepts connections.

    Args:
        port: On the loopback interface.
    """
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
