"""Connections to PostgreSQL: how one is made, for sessions and migrations too, and how the writer keeps its own."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import asyncpg

from backend.cc.config import Settings
from backend.cc.errors import ConnectError

CLOSE_SECONDS: Final = 3.0  # how long a connection may take to close
Connect = Callable[[float], Awaitable[asyncpg.Connection]]  # returns a new connection within so many seconds


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        tag: str = await super().execute(query, *args, **options)
        if tag == "ROLLBACK" and query.startswith("COMMIT"):
            # A statement of the transaction has failed before. asyncpg doesn't look at this answer.
            raise asyncpg.InFailedSQLTransactionError("rolled back instead of committed")
        return tag


async def connect(settings: Settings, seconds: float, *, command_timeout: float | None = None) -> asyncpg.Connection:
    """Connect to `DATABASE_URL` within so many seconds.

    Raises:
        asyncpg.PostgresError: The server refused, or no server could be reached (`ConnectError`).
    """
    url = settings.database_url.get_secret_value()
    limits = {"timeout": seconds, "command_timeout": command_timeout}
    try:
        return await asyncpg.connect(url, connection_class=_Connection, **limits)
    except asyncpg.PostgresError:
        raise
    except Exception as error:  # noqa: BLE001 - a peer with another protocol can make asyncpg raise anything
        name = type(error).__name__
    # SQLAlchemy wraps only PostgreSQL's errors. Outside of the `except`: the original's text has the address.
    raise ConnectError(name)


class Connections:
    """Connections that stay open, in one event loop. The one used last is used first, so that the others stay idle."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._idle: list[asyncpg.Connection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._trusted: set[asyncpg.Connection] = set()  # those opened since one was last found dead or read-only

    async def get(self, seconds: float) -> asyncpg.Connection:
        """Return an idle connection, or a new one within so many seconds."""
        while self._idle:
            if not (connection := self._idle.pop()).is_closed():
                return connection
            self._trusted.discard(connection)
        connection = await self._connect(seconds)
        self._trusted.add(connection)
        return connection

    def put(self, connection: asyncpg.Connection) -> None:
        """Take a connection back."""
        if connection in self._trusted:
            self._idle.append(connection)
        else:
            self.discard(connection)

    def discard(self, connection: asyncpg.Connection) -> None:
        """Close a connection in the background."""
        self._trusted.discard(connection)
        task = asyncio.get_running_loop().create_task(_close(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def distrust(self) -> None:
        """Use none again that is open now: a server that has ended one, or become read-only, has others like it."""
        self._trusted.clear()
        while self._idle:
            self.discard(self._idle.pop())

    async def aclose(self) -> None:
        """Close those that are idle, and wait for all that are closing."""
        self.distrust()
        await asyncio.gather(*self._closing)


async def _close(connection: asyncpg.Connection) -> None:
    # `close` also cancels what still runs; after `terminate` the server's processes would wait on, and pile up.
    with contextlib.suppress(Exception):  # no caller waits for it
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()
