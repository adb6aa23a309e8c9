"""The service's connections to PostgreSQL: for queries, for records, and their end."""

import asyncio
import contextlib
from functools import partial
from typing import Any

from sqlalchemy import ExceptionContext, event
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from backend.cc.config import Settings
from backend.cc.connection import connect
from backend.cc.errors import STALE_CONNECTION, DatabaseError
from backend.cc.writer import CLOSE_SECONDS, Writer


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
            pool_use_lifo=True,  # the connection that was returned last is warm
        )
        event.listen(self.engine.sync_engine, "checkout", _check)
        event.listen(self.engine.sync_engine, "handle_error", _handle_error)
        # `close_resets_only=False`: a closed session takes no more queries. A query after the end of a request, in a
        # background task, would begin a transaction that nothing commits, and records would join it.
        self._sessions = async_sessionmaker(
            self.engine, expire_on_commit=False, close_resets_only=False, info={"database": self}
        )
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def writer(self) -> Writer:
        """The writer of the running event loop."""
        self._enter()
        return self._writer

    def session(self, **options: Any) -> AsyncSession:
        """Return a new session, with SQLAlchemy's options. It opens a connection when it is first used for a query."""
        with contextlib.suppress(RuntimeError):  # it may be made before the event loop runs
            self._enter()
        return self._sessions(**options)

    async def aclose(self) -> None:
        """Write what waits and close every connection, in `seconds` and 6 at most: a frozen server never answers."""
        if self._loop not in (None, asyncio.get_running_loop()):
            return  # what another event loop has opened can't be closed in this one
        if self._loop:
            await self._writer.aclose()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.engine.dispose()
        self._loop = None

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _enter(self) -> None:
        """Begin anew in another event loop. The connections of one that ended without `aclose` can't be used in it."""
        if (loop := asyncio.get_running_loop()) is self._loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise DatabaseError("another event loop uses this Database: make one for each", "RuntimeError")
        size, batch = self._settings.cc_db_pool_size, self._settings.cc_db_batch_size
        self._writer = Writer(partial(connect, self._settings), size=size, batch=batch, seconds=self.seconds)
        if self._loop is not None:
            self.engine.sync_engine.dispose(close=False)
        self._loop = loop


def _check(dbapi_connection: Any, *_: object) -> None:
    driver = dbapi_connection.driver_connection
    if driver.is_closed():
        # A server that restarts closes every connection. The pool replaces all that are as old as this one.
        raise InvalidatePoolError
    if driver.is_in_transaction():
        # Code that used the driver directly left a transaction open here, and SQLAlchemy does not know of it.
        # A record that joined it would be acknowledged and then rolled back.
        driver.terminate()
        raise DisconnectionError


def _handle_error(context: ExceptionContext) -> OperationalError | None:
    error = context.original_exception
    state = getattr(error, "sqlstate", None)
    if state in STALE_CONNECTION:
        # If the server has become read-only (25006), all the others lead there, too.
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, state == "25006"
    # SQLAlchemy drops the connection of a statement that timed out, but passes the TimeoutError on as it is.
    return OperationalError(None, None, error) if isinstance(error, TimeoutError) else None
