"""The service's connections to PostgreSQL: for queries, for records, and their end."""

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import ExceptionContext, event
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from backend.cc.config import Settings
from backend.cc.connection import CLOSE_SECONDS, connect
from backend.cc.errors import STALE_CONNECTION, DatabaseError
from backend.cc.writer import Writer


class Database(contextlib.AbstractAsyncContextManager["Database"]):
    """Engine, sessions and writer. It connects to nothing until it is used, and may be used again after `aclose`."""

    def __init__(self, settings: Settings) -> None:
        self.seconds = settings.cc_db_timeout_seconds  # of a record, and of each statement of a session
        self.engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(connect, settings, self.seconds, command_timeout=self.seconds),
            hide_parameters=True,
            pool_size=settings.cc_db_pool_size,
            max_overflow=0,  # the size is the number of connections that an operator must plan for
            pool_timeout=self.seconds,
        )
        event.listen(self.engine.sync_engine, "checkout", _check)
        event.listen(self.engine.sync_engine, "handle_error", _handle_error)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False, info={"database": self})
        size, batch = settings.cc_db_pool_size, settings.cc_db_batch_size
        self._new_writer = partial(Writer, partial(connect, settings), size=size, batch=batch, seconds=self.seconds)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def write(self, statement: str, values: Sequence[Any], *, known: bool) -> bool:
        """Write a record, in whichever event loop runs by then; see `Writer.write`."""
        self._enter()
        return await self._writer.write(statement, values, known=known)

    def session(self, **options: Any) -> AsyncSession:
        """Return a new session, with SQLAlchemy's options. It opens a connection when it is first used for a query."""
        with contextlib.suppress(RuntimeError):  # it may be made before the event loop runs
            self._enter()
        return self._sessions(**options)

    async def aclose(self) -> None:
        """Write what waits and close every connection, in `seconds` and 7 at most: a frozen server never answers."""
        if self._loop in (None, asyncio.get_running_loop()):  # another loop's connections can't be closed in this one
            if self._loop:
                await self._writer.aclose()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.engine.dispose(), CLOSE_SECONDS)
            self._loop = None

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _enter(self) -> None:
        """Begin anew in another event loop. The connections of one that ended without `aclose` can't be used in it."""
        if (loop := asyncio.get_running_loop()) is self._loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise DatabaseError("another event loop uses this Database: make one for each", "RuntimeError")
        if self._loop is not None:
            self.engine.sync_engine.dispose(close=False)
        self._loop, self._writer = loop, self._new_writer()


def _check(dbapi_connection: Any, *_: object) -> None:
    driver = dbapi_connection.driver_connection
    if driver.is_closed():
        raise InvalidatePoolError  # a server that restarts closes every connection
    if driver.is_in_transaction():
        # Code that used the driver directly left it open. A record that joined it would be lost.
        driver.terminate()
        raise DisconnectionError


def _handle_error(context: ExceptionContext) -> OperationalError | None:
    error = context.original_exception
    if (state := getattr(error, "sqlstate", None)) in STALE_CONNECTION:
        # If the server has become read-only (25006), all the others lead there, too.
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, state == "25006"
    # SQLAlchemy drops the connection of a statement that timed out, but passes the TimeoutError on as it is.
    return OperationalError(None, None, error) if isinstance(error, TimeoutError) else None
