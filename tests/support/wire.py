"""A proxy in front of PostgreSQL that counts what a client sends, and can lead to another server."""

import contextlib
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import make_url

from devtools.ports import HOST

_ROUND_TRIPS: Final = (b"Q", b"S")
"""Frontend messages after which a client waits for the server: Query and Sync (PostgreSQL manual, 54.7)."""

_UNANSWERED: Final = (b"P", b"B", b"D", b"E", b"C")
"""Frontend messages that the server answers only after a Sync: they are passed on together with it."""


@dataclass
class Wire:
    """A way to the server, and what has passed on it.

    Attributes:
        url: A database URL that leads through the proxy.
        server: The URL that new connections lead to. If it changes, open ones stay where they are, as they do if a name
            moves.
        messages: How many frontend messages have passed, by their type. The first one of a connection has none.
    """

    url: str
    server: str
    messages: Counter[bytes] = field(default_factory=Counter)

    @property
    def round_trips(self) -> int:
        """How often the client has waited for the server."""
        return sum(self.messages[kind] for kind in _ROUND_TRIPS)


@contextlib.contextmanager
def counted(database_url: str) -> Iterator[Wire]:
    """Run a proxy on a TCP port of the loopback interface. Its threads serve synchronous and asynchronous clients.

    Args:
        database_url: A server on a Unix socket (`?host=DIRECTORY`) or on a TCP port, without TLS.

    Yields:
        What passes.
    """

    class Connection(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            url = make_url(wire.server)
            directory, port = url.query.get("host"), url.query.get("port", "5432")
            postgres = socket.socket(socket.AF_UNIX if directory else socket.AF_INET)
            postgres.connect(f"{directory}/.s.PGSQL.{port}" if directory else (url.host or HOST, url.port or 5432))
            answers = threading.Thread(target=_copy, args=(postgres, self.connection), daemon=True)
            answers.start()
            with contextlib.suppress(OSError, ValueError):  # one of the two has closed the connection
                unsent, typed = b"", 0
                while head := self.rfile.read(typed + 4):
                    unsent += head + self.rfile.read(int.from_bytes(head[typed:], "big") - 4)
                    kind, typed = head[:typed], 1
                    wire.messages[kind] += 1
                    if kind not in _UNANSWERED:
                        postgres.sendall(unsent)
                        unsent = b""
            with contextlib.suppress(OSError):
                postgres.shutdown(socket.SHUT_RDWR)
            answers.join()
            postgres.close()

    with socketserver.ThreadingTCPServer((HOST, 0), Connection) as server:
        server.daemon_threads = True
        proxied = make_url(database_url).set(host=HOST, port=server.server_address[1], query={"sslmode": "disable"})
        wire = Wire(proxied.render_as_string(hide_password=False), database_url)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield wire
        finally:
            server.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until one of the two connections ends, then end the other one."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
