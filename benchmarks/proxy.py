"""A PostgreSQL that is further away: a TCP proxy that holds back what the client says, and counts its round trips."""

import contextlib
import socket
import socketserver
import threading
import time
from typing import Self

_AWAITS_ANSWER = frozenset(b"QS")
"""Messages after which a client waits: Query and Sync (PostgreSQL manual, "Message Formats")."""


class DelayProxy:
    """Listens on a port of 127.0.0.1 and forwards to PostgreSQL's Unix socket.

    Threads that sleep, not an event loop: its timers are only good for whole milliseconds.

    Args:
        socket_path: PostgreSQL's socket.
        seconds: What is added to each round trip, all of it on the way there.
    """

    def __init__(self, socket_path: str, *, seconds: float) -> None:
        self.round_trips = 0
        proxy = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.socket(socket.AF_UNIX) as postgres:
                    postgres.connect(socket_path)
                    self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self.answer, args=(postgres,), daemon=True).start()
                    unread, typed = b"", False
                    while data := self.request.recv(65536):
                        unread, typed = proxy._count(unread + data, typed=typed)
                        time.sleep(seconds)
                        postgres.sendall(data)

            def answer(self, postgres: socket.socket) -> None:
                with contextlib.suppress(OSError):  # the client has gone
                    while data := postgres.recv(65536):
                        self.request.sendall(data)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def _count(self, unread: bytes, *, typed: bool) -> tuple[bytes, bool]:
        """Count the whole messages; return the rest. The first one of a connection has no type."""
        while len(unread) > 4:  # noqa: PLR2004 - the length's own bytes
            length = int.from_bytes(unread[typed : typed + 4], "big") + typed
            if len(unread) < length:
                break
            self.round_trips += typed and unread[0] in _AWAITS_ANSWER
            unread, typed = unread[length:], True
        return unread, typed

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
