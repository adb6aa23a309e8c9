"""`log_l1`: write what happened into L1 memory, durable before it returns."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Protocol
from uuid import UUID

from opentelemetry import trace
from opentelemetry.context import attach, detach
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from backend.cc.database import Database
from backend.cc.errors import DATABASE_ERRORS, DatabaseError, DatabaseUnavailableError, database_error
from backend.cc.jsonb import clean_text, to_jsonb
from backend.cc.mem0_models import BaseLog
from backend.cc.records import EventRecord, PromptRecord, Record, check_name
from backend.cc.writer import BARRIER
from common.request_id_middleware import generate_request_id, request_id_var

__all__ = ["DatabaseError", "DatabaseUnavailableError", "EventRecord", "PromptRecord", "log_l1"]

SOURCE_MODULE: Final = "cc"  # the `source_module` of every record

tracer = trace.get_tracer("cos-cc")
_Write = Callable[..., Awaitable[bool]]  # `Writer.write`, or the same through a session


async def log_l1(
    session: AsyncSession, record: Record, *, request_id: str | None = None, record_id: UUID | None = None
) -> UUID:
    """Write one record to L1 memory: a base row and its prompt or event, in one statement.

    In a session that is inside a transaction the record joins it, and commits or rolls back with it. Otherwise the
    record is committed when this returns: a session of `Database` leaves it to the writer, which is fastest, and any
    other session begins and commits a transaction. The call is one span, on which the row never depends.

    Args:
        session: Any session on PostgreSQL through asyncpg. Tasks must not share one that is in a transaction.
        record: What happened.
        request_id: The record's request, 1 to 255 characters. By default the current one; outside any, a new id.
        record_id: The record's id; by default a new UUIDv7. To retry after a `DatabaseUnavailableError`, pass the
            error's `record_id`: the record is then stored exactly once, with the content of the first call.

    Returns:
        The record's id, which is the base row's.

    Raises:
        DatabaseUnavailableError: The database can't be written to now. The record may be stored all the same.
        DatabaseError: PostgreSQL refused, e.g. because no migration has been run.
        ValueError: `record`, `request_id` or `record_id` is not valid, or the session's driver is another.
    """
    write = _write_for(session, joins=session.in_transaction())
    return await _log(write, record, request_id=request_id, record_id=record_id)


class BoundLogL1(Protocol):
    """`log_l1` with its session given."""

    async def __call__(
        self, record: Record, *, request_id: str | None = None, record_id: UUID | None = None
    ) -> UUID: ...


def bind_log_l1(session: AsyncSession) -> BoundLogL1:
    """Return `log_l1` for a session, but outside of its transaction if it is one of `Database`."""
    return partial(_log, _write_for(session, joins=False))


async def _log(write: _Write, record: Record, *, request_id: str | None = None, record_id: UUID | None = None) -> UUID:
    if request_id is None:
        request_id = request_id_var.get() or generate_request_id()
    check_name("request_id", request_id)
    request_id = clean_text(request_id)
    if record_id is not None and not isinstance(record_id, UUID):
        raise ValueError("record_id must be a UUID")
    new_id = record_id or uuid7()
    fields: tuple[Any, ...]
    if isinstance(record, PromptRecord):
        table, statement, event_type = "prompt_trace", INSERT_PROMPT, "prompt_trace"
        fields = (clean_text(record.role), clean_text(record.content), record.tokens_in, record.tokens_out)
    elif isinstance(record, EventRecord):
        table, statement, event_type = "event_log", INSERT_EVENT, clean_text(record.event_type)
        fields = (event_type, to_jsonb(record.payload))
    else:
        raise ValueError("record must be a PromptRecord or an EventRecord")

    span = _start_span(table, request_id, event_type, new_id)
    token = attach(trace.set_span_in_context(span)) if span.is_recording() else None
    try:
        trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        values = (new_id, datetime.now(UTC), SOURCE_MODULE, request_id, trace_id, *fields)
        if not await write(statement, values, known=record_id is not None):
            raise DatabaseError("a trigger has suppressed the record", "suppressed")
    except BaseException as error:
        # The class or the SQLSTATE, and no text: an error's text is content.
        span.set_attribute("error.type", getattr(error, "code", "") or type(error).__name__)
        if isinstance(error, DatabaseError):
            error.record_id = new_id
            if error.sqlstate:
                span.set_attribute("db.response.status_code", error.sqlstate)
        span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        if token:
            detach(token)
        span.end()
    return new_id


def _start_span(table: str, request_id: str, event_type: str, record_id: UUID) -> trace.Span:
    parent = trace.get_current_span().get_span_context()
    if parent.is_valid and not parent.trace_flags.sampled:
        # The trace is not recorded. A child would not be either, and making it costs as much as all else here.
        return trace.NonRecordingSpan(parent)
    attributes = _ATTRIBUTES[table] | {
        "request_id": request_id,
        "mem0.event_type": event_type,
        "mem0.record_id": str(record_id),
        "logfire.msg": f"log_l1 {event_type}",
    }
    return tracer.start_span(f"log_l1 {table}", kind=trace.SpanKind.CLIENT, attributes=attributes)


def _write_for(session: AsyncSession, *, joins: bool) -> _Write:
    database = session.info.get("database")
    if isinstance(database, Database) and session.bind is database.engine and not joins:
        return database.write
    return partial(_through, session)


async def _through(session: AsyncSession, statement: str, values: Sequence[Any], *, known: bool) -> bool:
    """Do as `Writer.write` does, but through a session: join its transaction, or begin and commit one."""
    if (driver := session.get_bind(BaseLog).dialect.driver) != "asyncpg":
        raise ValueError(f"log_l1 needs a session on PostgreSQL through asyncpg, not {driver}")
    limit = asyncio.timeout(getattr(session.info.get("database"), "seconds", None))
    turn = session.info.setdefault("log_l1", asyncio.Lock())  # `LogL1` may be called concurrently
    try:
        async with limit, turn, contextlib.nullcontext() if session.in_transaction() else session.begin():
            transaction = session.sync_session.get_transaction()
            connection = await session.connection(bind_arguments={"mapper": BaseLog})
            is_stored = (await connection.exec_driver_sql(statement, tuple(values))).first() is not None
            if known and not is_stored:
                await connection.exec_driver_sql(BARRIER)
            if session.sync_session.get_transaction() is transaction:
                return is_stored or known
        # A concurrent task has ended the transaction. SQLAlchemy then began another one, which nothing commits.
        failure = DatabaseError("the session's transaction has ended: tasks must not share a session", "shared")
    except DATABASE_ERRORS as error:
        failure = database_error(error)
    # Outside of the `except`: the original's text repeats the row, and as `__context__` it would still be printed.
    raise failure


# Each statement writes a whole record, atomic by itself. ON CONFLICT makes it safe to repeat. The id is in every part,
# and nothing is selected from `base`, so that a distributed PostgreSQL sends it to one shard. RETURNING $1 tells if the
# row was inserted, and names no column, so that a role which may only INSERT may run it.
INSERT_PROMPT: Final = """\
WITH base AS (
    INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
)
INSERT INTO mem0_cc.prompt_trace (base_log_id, role, content, tokens_in, tokens_out)
VALUES ($1, $6, $7, $8, $9) ON CONFLICT DO NOTHING
RETURNING $1"""
INSERT_EVENT: Final = """\
WITH base AS (
    INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
)
INSERT INTO mem0_cc.event_log (base_log_id, event_type, payload) VALUES ($1, $6, $7) ON CONFLICT DO NOTHING
RETURNING $1"""

# OpenTelemetry's stable attributes of a database call.
_ATTRIBUTES: Final = {
    table: {
        "layer": "service",
        "db.system.name": "postgresql",
        "db.operation.name": "INSERT",
        "db.collection.name": f"mem0_cc.{table}",
        "db.query.summary": f"INSERT mem0_cc.base_log INSERT mem0_cc.{table}",
        "db.query.text": statement,
    }
    for table, statement in (("prompt_trace", INSERT_PROMPT), ("event_log", INSERT_EVENT))
}
