"""What endpoints and services are given: the settings, a session, `log_l1`."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator, Sequence
from typing import Annotated, Any, Final, Protocol
from uuid import UUID

import asyncpg
from fastapi import Depends
from fastapi.requests import HTTPConnection
from opentelemetry.sdk.trace import SpanProcessor
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import ExceptionContext, event, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError, InvalidatePoolError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from backend.cc.services.logging import (
    DATABASE_ERRORS,
    DatabaseError,
    DatabaseUnavailableError,
    Record,
    database_error,
    deadline,
    log_l1,
)
from common.logger_logfire import configure_logfire

_UNSUPPORTED_PARAMETERS: Final = frozenset(
    {
        "channel_binding",
        "connect_timeout",
        "fallback_application_name",
        "gssdelegation",
        "gssencmode",
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "prepared_statement_cache_size",
        "require_auth",
        "requirepeer",
        "ssl",
        "sslcertmode",
        "sslcompression",
        "sslcrldir",
        "sslsni",
        "tcp_user_timeout",
    }
)
"""Parameters of a URL that libpq or SQLAlchemy know. asyncpg would take them for settings of the server, and every
connection would be refused."""

_URL_HINT: Final = (
    "is no database URL. In a password @ : / are written %40 %3A %2F; several hosts ?host=one,two&port=5432,5432"
)


class Settings(BaseSettings):
    """The service's configuration, from environment variables of the same names."""

    # Errors say which variable is wrong, not what is in it: it may be a password.
    model_config = SettingsConfigDict(env_ignore_empty=True, hide_input_in_errors=True, frozen=True)

    database_url: SecretStr
    """PostgreSQL, as `postgres://`, `postgresql://` or `postgresql+asyncpg://`."""
    logfire_token: SecretStr | None = None
    """Logfire's write token. Without it nothing is sent there."""
    logfire_environment: str | None = None
    """Name of the deployment, shown in traces."""
    logfire_console: bool = False
    """Whether to print spans to standard output too."""
    otel_exporter_otlp_endpoint: str | None = None
    """Any OTLP backend, e.g. http://127.0.0.1:4318. The OpenTelemetry SDK reads it, and the other
    `OTEL_*` variables, by itself."""
    otel_exporter_otlp_traces_endpoint: str | None = None
    """The same for traces alone: the full address, path included."""
    cc_db_pool_size: int = Field(default=10, ge=1)
    """Connections to the database at most, in each worker process."""
    cc_db_timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest that a record or a commit may take, waiting for a connection included, in seconds."""
    cc_debug_routes: bool = True
    """Whether `POST /test-log` exists."""
    cc_distributed_tracing: bool = False
    """Whether to continue the trace that a caller's `traceparent` header names."""
    cc_max_body_bytes: int = Field(default=1_048_576, ge=0)
    """Largest request body, in bytes; a larger one is answered 413."""
    cc_trace_sql: bool = True
    """Whether SQL statements are spans of their own, without their parameters."""

    @field_validator("database_url")
    @classmethod
    def _as_dsn(cls, value: SecretStr) -> SecretStr:
        # asyncpg reads an address as libpq would: sslmode, a socket's directory, several hosts. SQLAlchemy
        # reads it first, since it copes with characters in a password that were not escaped.
        try:
            url = make_url(value.get_secret_value().strip())
        except (ArgumentError, ValueError):
            raise ValueError(_URL_HINT) from None
        if url.get_backend_name() not in ("postgres", "postgresql"):
            raise ValueError("must begin with postgres://, postgresql:// or postgresql+asyncpg://")
        if unknown := sorted(_UNSUPPORTED_PARAMETERS.intersection(url.query)):
            raise ValueError(f"has parameters that asyncpg does not know: {', '.join(unknown)}")
        return SecretStr(url.set(drivername="postgresql").render_as_string(hide_password=False))


def configure_tracing(settings: Settings, service_name: str, *, span_processors: Sequence[SpanProcessor] = ()) -> None:
    """Start tracing for this process, with Logfire or any OTLP backend, as the settings say.

    Args:
        settings: Where spans go, and which are made.
        service_name: The OpenTelemetry `service.name`, 1 character or more.
        span_processors: More OpenTelemetry span processors, e.g. a test's exporter.
    """
    token = settings.logfire_token
    configure_logfire(
        service_name,
        token=token.get_secret_value() if token else None,
        environment=settings.logfire_environment,
        otlp=bool(settings.otel_exporter_otlp_endpoint or settings.otel_exporter_otlp_traces_endpoint),
        console=settings.logfire_console,
        trace_sql=settings.cc_trace_sql,
        distributed_tracing=settings.cc_distributed_tracing,
        span_processors=span_processors,
    )


def create_engine(settings: Settings, *, command_timeout: float | None = None) -> AsyncEngine:
    """Return an engine for the service's database. Connects to nothing until it is used.

    Args:
        settings: Where the database is, how many connections, how long to wait for one.
        command_timeout: Longest that any statement may take, in seconds, or None for no bound.
    """
    dsn = settings.database_url.get_secret_value()

    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(
                dsn,
                timeout=settings.cc_db_timeout_seconds,
                command_timeout=command_timeout,
                connection_class=_Connection,
            )
        except (OSError, ValueError, LookupError, AttributeError, BufferError) as error:
            # Refused, timed out, no such host, not even a host's name, a peer that talks something else: made an error
            # of the database's, which SQLAlchemy wraps like any other. Its own text would name the address.
            raise asyncpg.ClientCannotConnectError(type(error).__name__) from None

    class Connecting:
        """An awaitable that connects. Unlike a coroutine it may be dropped unawaited, as `log_l1`'s checkout does."""

        def __await__(self) -> Generator[Any, None, asyncpg.Connection]:
            return connect().__await__()

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=Connecting,
        hide_parameters=True,
        pool_size=settings.cc_db_pool_size,
        # No overflow: the size is the number of connections that an operator has to reckon with.
        max_overflow=0,
        pool_timeout=settings.cc_db_timeout_seconds,
        # The last one returned goes out first: warm, and where it died, the one that reconnects.
        pool_use_lifo=True,
    )
    event.listen(engine.sync_engine, "checkout", _refuse_unusable)
    event.listen(engine.sync_engine, "handle_error", _handle_error)
    return engine


def create_sessions(settings: Settings) -> async_sessionmaker[AsyncSession]:
    """Return the service's session factory, on an engine of their own.

    Args:
        settings: See `create_engine`.
    """
    timeout = settings.cc_db_timeout_seconds
    # The bound of an endpoint's own queries, and of the rollback after them: a server that hangs hangs there too.
    engine = create_engine(settings, command_timeout=timeout)
    turns = asyncio.Semaphore(settings.cc_db_pool_size)
    return async_sessionmaker(
        engine,
        expire_on_commit=False,
        # Closed is closed: a query after the end of the request, in a background task or while the answer is
        # streamed, would begin a transaction that nobody commits, and records would join it.
        close_resets_only=False,
        info={"timeout": timeout, "turns": turns},
    )


async def get_db_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """Yield the session of the request, or of the WebSocket; commit what is open on it before the answer is sent.

    Nothing is opened for a request that never uses it. A transaction that an earlier query began is
    committed too, and the records that joined it with it; on an error it is rolled back. Afterwards, in a
    background task or while the answer is streamed, `log_l1` still commits, and a query is an InvalidRequestError.

    Raises:
        DatabaseUnavailableError: A query or the commit has failed, and may work later. No answer has been sent.
        DatabaseError: PostgreSQL refused one of them.
    """
    session: AsyncSession = connection.app.state.sessions()
    try:
        yield session
        if session.in_transaction():
            await _commit(session)
    except SQLAlchemyError as error:
        # An endpoint's own query. Not left to whoever catches it: its text repeats the row.
        raise database_error(error) from None
    except ExceptionGroup as group:
        # Of a TaskGroup. Where all of it is the database's, the gravest of it is what has happened.
        ours, others = group.split((SQLAlchemyError, DatabaseError))
        if ours is None or others is not None:
            raise
        raise min(_database_errors(ours), key=lambda error: isinstance(error, DatabaseUnavailableError)) from None
    finally:
        if session.in_transaction():
            # Shielded: cancelled again meanwhile, the rollback would break off, and take the connection with it.
            # On a connection that is dead there is nothing to roll back, and the answer stays what it is.
            with contextlib.suppress(DatabaseError, SQLAlchemyError):
                await asyncio.shield(session.close())
        else:
            session.sync_session.close()  # there is nothing to wait for


def _database_errors(group: ExceptionGroup[Exception]) -> Iterator[DatabaseError]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _database_errors(error)
        else:
            yield error if isinstance(error, DatabaseError) else database_error(error)


async def _commit(session: AsyncSession) -> None:
    try:
        async with deadline(session):
            await session.commit()
    except DATABASE_ERRORS as error:
        raise database_error(error) from None


# scope="function": a commit after the response was sent would answer 200 for rows that may never be.
DBSession = Annotated[AsyncSession, Depends(get_db_session, scope="function")]
"""An endpoint's parameter that is the request's session."""


class BoundLogL1(Protocol):
    """`log_l1` with its session given."""

    async def __call__(self, record: Record, *, request_id: str | None = None) -> UUID:
        """See `backend.cc.services.logging.log_l1`."""


async def get_log_l1(session: DBSession) -> BoundLogL1:
    """Return `log_l1`, bound to the request's session."""
    return functools.partial(log_l1, session)


LogL1 = Annotated[BoundLogL1, Depends(get_log_l1, scope="function")]
"""An endpoint's parameter that is `log_l1`, bound to the request's session."""


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """asyncpg's connection, where a COMMIT that has not committed is an error.

    Where a statement of the transaction has failed, and whoever sent it went on, PostgreSQL answers COMMIT with
    ROLLBACK. It is no error to PostgreSQL, and asyncpg does not look.
    """

    def execute(self, query: str, *args: Any, **options: Any) -> Awaitable[str]:
        execution: Awaitable[str] = super().execute(query, *args, **options)
        return _committed(execution) if query == "COMMIT;" else execution


async def _committed(execution: Awaitable[str]) -> str:
    status = await execution
    if status != "COMMIT":
        raise asyncpg.InFailedSQLTransactionError("rolled back instead of committed")
    return status


def _refuse_unusable(dbapi_connection: Any, *_: object) -> None:
    driver = dbapi_connection.driver_connection
    if driver.is_closed():
        # A server that restarts closes every connection. asyncpg has noticed by now, at no round trip; the
        # pool then replaces this connection and, as they come up, all that are as old.
        raise InvalidatePoolError
    if driver.is_in_transaction() or getattr(driver, "_top_xact", None):
        # Somebody's who has used asyncpg directly, and was cancelled maybe. SQLAlchemy knows nothing of it, and what
        # is written in it would be acknowledged and lost.
        driver.terminate()
        raise DisconnectionError


def _handle_error(context: ExceptionContext) -> DatabaseError | None:
    error = context.original_exception
    if getattr(error, "sqlstate", None) == asyncpg.InvalidSQLStatementNameError.sqlstate:
        # Somebody has dropped the prepared statements that asyncpg believes to be there (DISCARD ALL).
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
    # Of a statement that timed out SQLAlchemy gives up the connection, and passes the error on as it is.
    return database_error(error) if isinstance(error, OSError) else None
