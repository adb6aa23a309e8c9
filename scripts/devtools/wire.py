"""A proxy in front of PostgreSQL that counts what a client sends, and can stand for a server that is further away."""

import contextlib
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import make_url

from devtools.ports import HOST

ROUND_TRIPS: Final = frozenset({b"Q", b"S"})
"""Frontend messages after which a client waits for the server: Query and Sync (PostgreSQL manual, 54.7)."""


class Wire:
    """What has passed the proxy, and the way through it.

    Attributes:
        url: A database URL that leads through the proxy.
        messages: How many frontend messages have passed, by their type.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.messages: Counter[bytes] = Counter()

    @property
    def round_trips(self) -> int:
        """How often the client has waited for the server."""
        return sum(self.messages[kind] for kind in ROUND_TRIPS)


@contextmanager
def counted(database_url: str, *, delay: float = 0) -> Iterator[Wire]:
    """Run a proxy on a TCP port of the loopback interface. Its threads serve synchronous and asynchronous clients.

    Args:
        database_url: A server on a Unix socket (`?host=DIRECTORY`) or on a TCP port, without TLS.
        delay: Seconds that each round trip takes longer. Threads that sleep keep to fractions of a millisecond,
            which the timers of an event loop do not.

    Yields:
        What passes.
    """
    url = make_url(database_url)
    directory = url.query.get("host")
    port = url.query.get("port", "5432")

    class Connection(socketserver.BaseRequestHandler):
        request: socket.socket

        def handle(self) -> None:
            if isinstance(directory, str):
                postgres = socket.socket(socket.AF_UNIX)
                postgres.connect(f"{directory}/.s.PGSQL.{port}")
            else:
                postgres = socket.create_connection((url.host or HOST, url.port or 5432))
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=_copy, args=(postgres, self.request), daemon=True)
            answers.start()
            with contextlib.suppress(OSError):  # one of the two has closed the connection
                unread, typed = b"", False
                while data := self.request.recv(65_536):
                    unread, typed = _count(unread + data, wire.messages, typed=typed)
                    time.sleep(delay)
                    postgres.sendall(data)
            with contextlib.suppress(OSError):
                postgres.shutdown(socket.SHUT_RDWR)
            answers.join()
            postgres.close()

    with socketserver.ThreadingTCPServer((HOST, 0), Connection) as server:
        server.daemon_threads = True
        proxied = url.set(host=HOST, port=server.server_address[1], query={"sslmode": "disable"})
        wire = Wire(proxied.render_as_string(hide_password=False))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield wire
        finally:
            server.shutdown()


def _count(unread: bytes, messages: Counter[bytes], *, typed: bool) -> tuple[bytes, bool]:
    """Count the messages that are complete, and return the rest.

    Args:
        unread: What the client has sent since the last complete message.
        messages: Where to count.
        typed: Whether the next message begins with its type; the first message of a connection does not.
    """
    while len(unread) > 4:  # noqa: PLR2004 - the length's own bytes
        length = int.from_bytes(unread[typed : typed + 4], "big") + typed
        if len(unread) < length:
            break
        if typed:
            messages[unread[:1]] += 1
        unread, typed = unread[length:], True
    return unread, typed


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until one of the two connections ends, then end the other one."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
