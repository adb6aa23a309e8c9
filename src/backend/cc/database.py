"""The service's connections to PostgreSQL: for queries, for records, and their end."""

import asyncio
import contextlib
import ssl
from functools import partial
from typing import Any, Final

import asyncpg
from sqlalchemy import ExceptionContext, event
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from backend.cc.config import Settings
from backend.cc.errors import STALE_CONNECTION, DatabaseError
from backend.cc.writer import CLOSE_SECONDS, Writer

READ_ONLY: Final = "25006"


class Database(contextlib.AbstractAsyncContextManager["Database"]):
    """Engine, sessions and writer. It connects to nothing until it is used, and may be used again after `aclose`.

    Attributes:
        seconds: Timeout of a record, and of each statement of a session.
        engine: The engine of the sessions, an ordinary one.
    """

    def __init__(self, settings: Settings) -> None:
        self.seconds = settings.cc_db_timeout_seconds
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
        self._new_writer = partial(
            Writer,
            partial(connect, settings),
            size=settings.cc_db_pool_size,
            batch=settings.cc_db_batch_size,
            seconds=self.seconds,
        )
        self._writer = self._new_writer()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def writer(self) -> Writer:
        """The writer of the running event loop."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._enter(loop)
        return self._writer

    def session(self, **options: Any) -> AsyncSession:
        """Return a new session, with SQLAlchemy's options. It opens a connection when it is first used for a query."""
        with contextlib.suppress(RuntimeError):  # it may be made before the event loop runs
            if self._loop is not (loop := asyncio.get_running_loop()):
                self._enter(loop)
        return self._sessions(**options)

    async def aclose(self) -> None:
        """Write what waits and close every connection, giving up those that don't close: a frozen server never answers.

        It takes the timeout of a record and 6 seconds at most.
        """
        if self._loop is asyncio.get_running_loop():
            await self._writer.aclose()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self.engine.dispose()
            self._loop = None

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave the connections of another event loop, which has ended, as a test client's without `with` has."""
        if self._loop is not None and self._loop.is_running():
            raise DatabaseError("another event loop uses this Database: make one for each", "RuntimeError")
        if self._loop is not None:
            self._writer = self._new_writer()
            self.engine.sync_engine.dispose(close=False)
        self._loop = loop


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        tag: str = await super().execute(query, *args, **options)
        if tag == "ROLLBACK" and query.startswith("COMMIT"):
            # A statement of the transaction has failed before. asyncpg does not look at this answer.
            raise asyncpg.InFailedSQLTransactionError("rolled back instead of committed")
        return tag


async def connect(settings: Settings, seconds: float, *, command_timeout: float | None = None) -> asyncpg.Connection:
    """Connect to `DATABASE_URL` within so many seconds. Raises one of asyncpg's errors, without the address in it."""
    url = settings.database_url.get_secret_value()
    try:
        return await asyncpg.connect(
            url, timeout=seconds, command_timeout=command_timeout, connection_class=_Connection
        )
    except (OSError, ValueError, LookupError, AttributeError, BufferError, OverflowError) as error:
        # Refused, timed out, no such host, or a peer with another protocol. SQLAlchemy wraps only asyncpg's own
        # errors, so this error becomes one of those.
        no_tls = isinstance(error, ssl.SSLError) or type(error) is ConnectionError
        refusal = (asyncpg.ConnectionRejectionError if no_tls else asyncpg.ClientCannotConnectError)(
            type(error).__name__
        )
    raise refusal


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
        # After a switchover all the others lead to the read-only server, too.
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, state == READ_ONLY
    # SQLAlchemy drops the connection of a statement that timed out, but passes the TimeoutError on as it is.
    return OperationalError(None, None, error) if isinstance(error, TimeoutError) else None
