"""The loopback interface. Everything that runs locally listens on it, and on no other interface."""

import os
import socket
from typing import Final

HOST: Final = "127.0.0.1"


def port_of(variable: str, default: int) -> int:
    """Return the port that an environment variable names. Raises OSError where it names none."""
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal() or int(value) not in range(1, 65_536):
        raise OSError(f"{variable} must be a port, 1 to 65535")
    return int(value)


def require_free(port: int, remedy: str) -> None:
    """Raise OSError where a port is taken, before anything is started; `remedy` says how to choose another port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run do not count
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(f"{HOST}:{port}: {error.strerror}. Another port: {remedy}") from error


def listens(port: int) -> bool:
    """Tell whether a process accepts connections on a port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])
