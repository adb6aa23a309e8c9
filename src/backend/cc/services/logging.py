"""`log_l1`: write what happened into L1 memory, durable before it returns."""

import asyncio
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from opentelemetry import trace
from opentelemetry.context import attach, detach
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from backend.cc.database import Database
from backend.cc.errors import DATABASE_ERRORS, DatabaseError, DatabaseUnavailableError, database_error
from backend.cc.jsonb import clean_text, to_jsonb
from backend.cc.records import EventRecord, PromptRecord, Record, check_name
from common.request_id_middleware import generate_request_id, request_id_var

__all__ = ["DatabaseError", "DatabaseUnavailableError", "EventRecord", "PromptRecord", "log_l1"]

SOURCE_MODULE: Final = "cc"  # the `source_module` of every record

tracer = trace.get_tracer("cos-cc")


async def log_l1(
    session: AsyncSession, record: Record, *, request_id: str | None = None, record_id: UUID | None = None
) -> UUID:
    """Write one record to L1 memory: a base row and its prompt or event, in one statement.

    The record is committed when this returns. In a session that is inside a transaction it joins the transaction
    instead, and commits or rolls back with it. The call is one span, on which the row never depends.

    Args:
        session: One of `Database.session`. Concurrent tasks must not share one that is in a transaction.
        record: What happened.
        request_id: The record's request, 1 to 255 characters. By default the current one; outside any, a new id.
        record_id: The record's id; by default a new UUIDv7. To retry after a `DatabaseUnavailableError`, pass the
            error's `record_id`: the record is then stored exactly once, with the content of the first call.

    Returns:
        The record's id, which is the base row's.

    Raises:
        DatabaseUnavailableError: The database can't be written to now. The record may be stored all the same.
        DatabaseError: PostgreSQL refused, e.g. because no migration has been run.
        ValueError: `request_id` or `record_id` is not valid, or no `Database` made the session.
    """
    if request_id is None:
        request_id = request_id_var.get() or generate_request_id()
    check_name("request_id", request_id)
    request_id = clean_text(request_id)
    if record_id is not None and not isinstance(record_id, UUID):
        raise ValueError("record_id must be a UUID")
    new_id = record_id or uuid7()
    fields: tuple[Any, ...]
    if isinstance(record, PromptRecord):
        statement, constants, event_type = INSERT_PROMPT, _PROMPT, "prompt_trace"
        fields = (clean_text(record.role), clean_text(record.content), record.tokens_in, record.tokens_out)
    else:
        statement, constants, event_type = INSERT_EVENT, _EVENT, clean_text(record.event_type)
        fields = (event_type, to_jsonb(record.payload))

    span = _start_span(constants, request_id, event_type, new_id)
    token = attach(trace.set_span_in_context(span))
    try:
        trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        values = (new_id, datetime.now(UTC), SOURCE_MODULE, request_id, trace_id, *fields)
        if not await _write(session, statement, values) and record_id is None:
            raise DatabaseError("a trigger or a rule has suppressed the record", "suppressed")
    except BaseException as error:
        if isinstance(error, DatabaseError):
            error.record_id = new_id
        # The class or the SQLSTATE, and no text: an error's text is content.
        span.set_attribute("error.type", getattr(error, "code", "") or type(error).__name__)
        span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        detach(token)
        span.end()
    return new_id


def _start_span(constants: dict[str, str], request_id: str, event_type: str, record_id: UUID) -> trace.Span:
    parent = trace.get_current_span().get_span_context()
    if parent.is_valid and not parent.trace_flags.sampled:
        # The trace is not recorded. A child would not be either, and making it costs as much as a checkout.
        return trace.NonRecordingSpan(parent)
    attributes = constants | {
        "request_id": request_id,
        "mem0.event_type": event_type,
        "mem0.record_id": str(record_id),
        "logfire.msg": f"log_l1 {event_type}",
    }
    return tracer.start_span("log_l1", kind=trace.SpanKind.CLIENT, attributes=attributes)


async def _write(session: AsyncSession, statement: str, values: tuple[Any, ...]) -> bool:
    """Join the session's transaction, or commit alone. Return False where the statement inserted nothing."""
    database = Database.of(session)
    try:
        if not session.in_transaction():
            return await database.insert(statement, values)
        async with asyncio.timeout(database.seconds):
            return await _join(session, statement, values)
    except DATABASE_ERRORS as error:
        raise database_error(error) from None  # the original's text repeats the row, and a traceback would print it


async def _join(session: AsyncSession, statement: str, values: tuple[Any, ...]) -> bool:
    transaction = session.sync_session.get_transaction()
    result = await (await session.connection()).exec_driver_sql(statement, values)
    if session.sync_session.get_transaction() is not transaction:
        # A concurrent task has ended the transaction. SQLAlchemy then began another one, which nothing commits.
        raise DatabaseError("the session's transaction has ended meanwhile: tasks must not share a session", "shared")
    return result.rowcount == 1


# Each statement writes a whole record, atomic by itself, in one round trip. ON CONFLICT makes it safe to repeat. The id
# is in every part and nothing is selected from `base`, so that a distributed PostgreSQL sends it to one shard.
INSERT_PROMPT: Final = """\
WITH base AS (
    INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
)
INSERT INTO mem0_cc.prompt_trace (base_log_id, role, content, tokens_in, tokens_out)
VALUES ($1, $6, $7, $8, $9) ON CONFLICT DO NOTHING"""
INSERT_EVENT: Final = """\
WITH base AS (
    INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
)
INSERT INTO mem0_cc.event_log (base_log_id, event_type, payload) VALUES ($1, $6, $7) ON CONFLICT DO NOTHING"""

# OpenTelemetry's stable attributes of a database call.
_ATTRIBUTES: Final = {"layer": "service", "db.system.name": "postgresql", "db.operation.name": "INSERT"}
_PROMPT: Final = _ATTRIBUTES | {"db.collection.name": "mem0_cc.prompt_trace", "db.query.text": INSERT_PROMPT}
_EVENT: Final = _ATTRIBUTES | {"db.collection.name": "mem0_cc.event_log", "db.query.text": INSERT_EVENT}
