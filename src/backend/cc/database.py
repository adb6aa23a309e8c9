"""The service's connections to PostgreSQL. The driver's special cases live here and nowhere else."""

import asyncio
import contextlib
import ssl
from collections.abc import Generator
from functools import partial
from typing import Any, Final

import asyncpg
from sqlalchemy import ExceptionContext, PoolProxiedConnection, event
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from backend.cc.config import Settings
from backend.cc.errors import DATABASE_ERRORS, STALE_CONNECTION, DatabaseError, database_error

CLOSE_SECONDS: Final = 3.0  # how long `Database.aclose` waits for connections to close


class Database(contextlib.AbstractAsyncContextManager["Database"]):
    """The connections: how many, how long anything may take, and their end.

    Connects to nothing until it is used. It belongs to the event loop that uses it first; `log_l1` refuses another one.

    Attributes:
        seconds: The time limit of a record and of a commit, waiting for a connection included.
        session: `session()` makes a session. It opens a connection when it is first used for a query.
        idle: A session that is never used for a query, so that concurrent callers may share it to log.
    """

    def __init__(self, settings: Settings) -> None:
        self.seconds = settings.cc_db_timeout_seconds
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            # The time limit holds for an endpoint's own queries too, and for the rollback after them.
            async_creator=partial(Connecting, settings, command_timeout=self.seconds),
            hide_parameters=True,
            pool_size=settings.cc_db_pool_size,
            max_overflow=0,  # the size is the number of connections that an operator must plan for
            pool_timeout=self.seconds,
            pool_use_lifo=True,  # the connection that was returned last is warm
        )
        event.listen(self._engine.sync_engine, "checkout", _check)
        event.listen(self._engine.sync_engine, "handle_error", _handle_error)
        # SQLAlchemy's pool is unfair: a returned connection goes to the next caller that asks, not to the one that
        # has waited longest. The semaphore makes callers take turns.
        self._turns = asyncio.Semaphore(settings.cc_db_pool_size)
        self._loop: asyncio.AbstractEventLoop | None = None
        # `close_resets_only=False`: a closed session takes no more queries. A query after the end of a request, in a
        # background task, would begin a transaction that nothing commits, and records would join it.
        self.session = async_sessionmaker(
            self._engine, expire_on_commit=False, close_resets_only=False, info={"database": self}
        )
        self.idle = self.session()

    @staticmethod
    def of(session: AsyncSession) -> "Database":
        """Return the database that made `session`. Raises ValueError if none did."""
        if not isinstance(database := session.info.get("database"), Database):
            raise ValueError("the session must be one of Database.session()")
        return database

    async def insert(self, statement: str, values: tuple[Any, ...]) -> bool:
        """Insert a row and commit it, on a connection of its own, in one round trip: no BEGIN, no COMMIT.

        It goes to asyncpg directly: through SQLAlchemy it would cost as much CPU time again as the statement, which has
        asyncpg's placeholders and must be safe to run twice. Returns False where nothing was inserted, e.g. because the
        id exists already. Raises one of `DATABASE_ERRORS`; after `seconds` a TimeoutError.
        """
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if loop is not self._loop:
            raise DatabaseError("a Database belongs to one event loop: make another for this one", "RuntimeError")
        # The deadline needs no timer of its own around it all, which would cost as much as the pool: asyncpg limits the
        # statement, and a call of `insert` that has a turn began before this one, so its deadline is earlier.
        deadline = loop.time() + self.seconds
        async with self._turns:
            for attempt in (1, 2):
                connection = await self._checkout(deadline)
                driver: asyncpg.Connection = connection.driver_connection
                try:
                    tag = await driver.execute(statement, *values, timeout=deadline - loop.time())
                    if driver.is_in_transaction():
                        # Code that used the driver directly has sent a BEGIN just before: nothing is committed.
                        raise asyncpg.InterfaceError("a transaction is open on this connection")
                except BaseException as error:
                    if not isinstance(error, asyncpg.PostgresError) or error.sqlstate in STALE_CONNECTION:
                        # The call was cancelled, timed out or cut off, so the connection's state is unknown.
                        # `terminate`, not `close`: `close` waits for the server, which may be frozen.
                        driver.terminate()
                    if driver.is_closed():
                        connection.invalidate(error)
                        if attempt == 1 and isinstance(error, Exception) and not isinstance(error, TimeoutError):
                            continue  # a connection that died, perhaps long ago, is replaced once
                    raise
                finally:
                    connection.close()
                # The first attempt may have committed before its connection died: then the row was there already.
                return attempt > 1 or tag == "INSERT 0 1"
        raise AssertionError  # pragma: no cover - the second attempt returns or raises

    async def commit(self, session: AsyncSession) -> None:
        """Commit the transaction of `session` within the time limit. Raises DatabaseError."""
        try:
            async with asyncio.timeout(self.seconds):
                await session.commit()
        except DATABASE_ERRORS as error:
            raise database_error(error) from None  # the original's text repeats the row

    async def aclose(self) -> None:
        """Close every connection, and give up those that do not close in time: a frozen server never answers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._engine.dispose()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _checkout(self, deadline: float) -> PoolProxiedConnection:
        try:
            # An idle connection needs no I/O. Taking it here saves the greenlet switch, which costs the most.
            return self._engine.sync_engine.raw_connection()
        except MissingGreenlet:  # no connection is idle
            async with asyncio.timeout_at(deadline):
                return await self._engine.raw_connection()


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        tag: str = await super().execute(query, *args, **options)
        if tag == "ROLLBACK" and query.startswith("COMMIT"):
            # A statement of the transaction has failed before. asyncpg does not look at this answer.
            raise asyncpg.InFailedSQLTransactionError("rolled back instead of committed")
        return tag


class Connecting:
    """An awaitable connection. Unlike a coroutine it may be dropped unawaited, as `Database._checkout` does."""

    def __init__(self, settings: Settings, command_timeout: float | None = None) -> None:
        self._url = settings.database_url.get_secret_value()
        self._timeouts = {"timeout": settings.cc_db_timeout_seconds, "command_timeout": command_timeout}

    def __await__(self) -> Generator[Any, None, asyncpg.Connection]:
        return self._connect().__await__()

    async def _connect(self) -> asyncpg.Connection:
        try:
            return await asyncpg.connect(self._url, connection_class=_Connection, **self._timeouts)
        except (OSError, ValueError, LookupError, AttributeError, BufferError, OverflowError) as error:
            # Refused, timed out, no such host, or a peer with another protocol. SQLAlchemy wraps only asyncpg's own
            # errors, so this error becomes one of those. The original text would name the address.
            no_tls = isinstance(error, ssl.SSLError) or type(error) is ConnectionError
            refusal = asyncpg.ConnectionRejectionError if no_tls else asyncpg.ClientCannotConnectError
            raise refusal(type(error).__name__) from None


def _check(dbapi_connection: Any, *_: object) -> None:
    driver = dbapi_connection.driver_connection
    if driver.is_closed():
        # A server that restarts closes every connection. The pool replaces all that are as old as this one.
        raise InvalidatePoolError
    if driver.is_in_transaction():
        # Code that used the driver directly left a transaction open here, and SQLAlchemy does not know of it.
        # A record written now would be acknowledged and then rolled back.
        driver.terminate()
        raise DisconnectionError


def _handle_error(context: ExceptionContext) -> DatabaseError | None:
    error = context.original_exception
    if getattr(error, "sqlstate", None) in STALE_CONNECTION:
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
    # SQLAlchemy drops the connection of a statement that timed out, but passes the TimeoutError on as it is.
    return database_error(error) if isinstance(error, OSError) else None
