"""`log_l1`: write what happened into L1 memory, durable before it returns."""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from sqlalchemy import PoolProxiedConnection
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    EmulatedDBAPIException,
    MissingGreenlet,
    PendingRollbackError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from uuid_utils.compat import uuid7

from backend.cc.mem0_models import NAME_LENGTH
from common.request_id_middleware import generate_request_id, request_id_var

SOURCE_MODULE: Final = "cc"
"""The `source_module` of every record."""

TIMEOUT_SECONDS: Final = 5.0
"""How long `log_l1` tries, in seconds, where the session's `info["timeout"]` does not say."""

TOKENS_MAX: Final = 2**31 - 1
"""The largest token count: PostgreSQL's `integer`."""

DEPTH_MAX: Final = 128
"""Levels of nesting that a payload keeps. PostgreSQL and Python each end at a depth of their own,
which moves with their configuration; this one is below both and stays put."""

# Each statement is a whole record, atomic by itself and one round trip. It carries the client's id in every
# part and selects nothing from `base`, so that a distributed PostgreSQL (Citus) sends it to one shard.
# ON CONFLICT makes it safe to repeat when the connection dies before the answer.

INSERT_PROMPT: Final = """\
WITH base AS (
    INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
)
INSERT INTO mem0_cc.prompt_trace (base_log_id, role, content, tokens_in, tokens_out)
VALUES ($1, $6, $7, $8, $9) ON CONFLICT DO NOTHING"""
"""Writes a base row and its prompt."""

INSERT_EVENT: Final = """\
WITH base AS (
    INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
)
INSERT INTO mem0_cc.event_log (base_log_id, event_type, payload)
VALUES ($1, $6, $7) ON CONFLICT DO NOTHING"""
"""Writes a base row and its event."""

_UNAVAILABLE: Final = frozenset({"08", "25", "26", "28", "3D", "40", "53", "55", "57", "58"})
"""Classes of SQLSTATE (PostgreSQL manual, appendix A) that tell of the server's condition, not of the
statement: no connection, read-only, prepared statements dropped, refused login, no such database, rolled
back for another's sake, out of disk or connections, locked, shutting down, failing hardware."""

_REFUSED: Final = frozenset({"25000", "25001", "25P01", "25P02", "55000", "55P02", "58P01"})
"""SQLSTATEs of those classes that do tell of the statement, e.g. VACUUM in a transaction."""

_HINTS: Final = {
    "08001": ": nothing answers where DATABASE_URL points",
    "25P02": ": an earlier statement of the transaction has failed",
    **dict.fromkeys(["28000", "28P01"], ": the user or the password of DATABASE_URL is refused"),
    "3D000": ": there is no such database",
    "42501": ": the role lacks a privilege, see docs/roles.sql",
    "55P03": ": somebody else holds a lock",
    **dict.fromkeys(["3F000", "42P01", "42703"], ": has `alembic upgrade head` been run?"),
}
"""What SQLSTATEs mean that are mistakes of whoever runs or writes the service."""

DATABASE_ERRORS: Final = (
    SQLAlchemyError,
    EmulatedDBAPIException,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
"""What a database call raises, by way of SQLAlchemy or from asyncpg and the network directly."""

_CONNECTION_ERRORS: Final = (DBAPIError, DisconnectionError, PoolTimeoutError)
"""SQLAlchemy's errors that tell of the database, or of the connection to it."""

_NO_TURNS: Final = contextlib.nullcontext()

tracer = trace.get_tracer("cos-cc")


class InvalidRecordError(ValueError):
    """A record that is plainly wrong, found when it is built and before anything is written.

    Args:
        field: The name of the field.
        rule: What is true of every right value. The value itself is not repeated: it may be a prompt.
    """

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field} {rule}")
        self.field = field


class DatabaseError(Exception):
    """PostgreSQL has not acknowledged what it was asked for. Says why, and nothing of the statement."""


class DatabaseUnavailableError(DatabaseError):
    """Nothing is wrong with the statement: the database can't be used now. Worth trying again."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One message of a conversation with a model, as `log_l1` takes it.

    Args:
        role: Who speaks, e.g. "user" or "assistant": 1 to 255 characters.
        content: The text, any length that PostgreSQL takes (1 GB), empty allowed.
        tokens_in: Tokens that the model read, 0 to 2,147,483,647.
        tokens_out: Tokens that the model wrote, 0 to 2,147,483,647.

    Raises:
        InvalidRecordError: A ValueError that names the field.
    """

    role: str
    content: str
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        _check_name("role", self.role)
        if not isinstance(self.content, str):
            raise InvalidRecordError("content", "must be a string")
        _check_tokens("tokens_in", self.tokens_in)
        _check_tokens("tokens_out", self.tokens_out)

    @property
    def event_type(self) -> str:
        """What spans call a record of this kind."""
        return "prompt_trace"


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event of the system, as `log_l1` takes it.

    Args:
        event_type: Its kind, e.g. "tool.called": 1 to 255 characters. Spans carry it, so no content.
        payload: What belongs to it. Stored as JSON; see `to_jsonb` for what JSON can't express.

    Raises:
        InvalidRecordError: A ValueError that names the field.
    """

    event_type: str
    payload: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_name("event_type", self.event_type)
        if not isinstance(self.payload, Mapping):
            raise InvalidRecordError("payload", "must be a mapping")


Record = PromptRecord | EventRecord


async def log_l1(session: AsyncSession, record: Record, *, request_id: str | None = None) -> UUID:
    """Write one record to L1 memory: a base row and its prompt or event, in one statement.

    Durable when it returns: the row is committed. Where the session is inside a transaction, the
    record joins it instead, and commits or rolls back with it.

    Runs in a span of its own, which has the record's id from its start. The row never depends on
    the span: sampled out or not exported, it is written all the same.

    Args:
        session: A session bound to an `AsyncEngine` on asyncpg, as `create_sessions` makes them. Its
            `info["timeout"]` is the longest that a call takes, in seconds, waiting for a connection
            included; 5 by default.
        record: What happened.
        request_id: The request it belongs to, 1 to 255 characters. By default the current request's,
            outside any request a fresh one.

    Returns:
        The base row's id, a UUIDv7.

    Raises:
        DatabaseUnavailableError: The database can't be written to now. The record may still have been
            stored where the connection broke between the commit and its answer.
        DatabaseError: PostgreSQL refused, e.g. because no migration has been run.
        InvalidRecordError: A ValueError: `request_id` is empty or too long.
    """
    if request_id is None:
        request_id = request_id_var.get() or generate_request_id()
    else:
        _check_name("request_id", request_id)
        request_id = clean_text(request_id)

    record_id = uuid7()
    event_type = clean_text(record.event_type)
    # For the duration of the call, so that the SQL span inside carries the same id.
    id_token = request_id_var.set(request_id)
    try:
        attributes = {
            "layer": "service",
            "request_id": request_id,
            "mem0.event_type": event_type,
            "mem0.record_id": str(record_id),
        }
        with trace.use_span(tracer.start_span("log_l1", attributes=attributes), end_on_exit=True) as span:
            trace_id = trace.format_trace_id(span.get_span_context().trace_id)
            base = (record_id, datetime.now(UTC), SOURCE_MODULE, request_id, trace_id)
            try:
                if isinstance(record, PromptRecord):
                    role, content = clean_text(record.role), clean_text(record.content)
                    await _store(session, INSERT_PROMPT, (*base, role, content, record.tokens_in, record.tokens_out))
                else:
                    await _store(session, INSERT_EVENT, (*base, event_type, to_jsonb(record.payload)))
            except asyncio.CancelledError:
                # No error to `use_span`. But the row may be missing, and the span must not look as if it were there.
                span.set_status(trace.StatusCode.ERROR)
                raise
    finally:
        request_id_var.reset(id_token)
    return record_id


def current_trace_id() -> str:
    """Return the id of the trace going on, 32 hexadecimal digits; all zeros where there is none."""
    return trace.format_trace_id(trace.get_current_span().get_span_context().trace_id)


def database_error(error: Exception) -> DatabaseError:
    """Return what a database call's error means, and none of its text, which repeats the row.

    Args:
        error: What SQLAlchemy, asyncpg or the network raised at a database call.

    Returns:
        DatabaseUnavailableError where trying again later may help, else DatabaseError.
    """
    cause = getattr(error, "orig", None) or error
    sqlstate: str | None = getattr(cause, "sqlstate", None)
    if sqlstate is None:
        # A transaction that goes on after its connection has died (https://sqlalche.me/e/8s2b).
        died = isinstance(error, PendingRollbackError) and error.code == "8s2b"
        if isinstance(error, SQLAlchemyError) and not isinstance(error, _CONNECTION_ERRORS) and not died:
            # SQLAlchemy's own, before the database is asked: a closed session, a parameter that is not given.
            return DatabaseError(f"the session can't do this ({type(cause).__name__})")
        return DatabaseUnavailableError(f"the database is unavailable ({type(cause).__name__})")
    hint = _HINTS.get(sqlstate, "")
    if sqlstate[:2] in _UNAVAILABLE and sqlstate not in _REFUSED:
        return DatabaseUnavailableError(f"the database is unavailable (SQLSTATE {sqlstate}){hint}")
    return DatabaseError(f"PostgreSQL refused the statement (SQLSTATE {sqlstate}){hint}")


def deadline(session: AsyncSession) -> asyncio.Timeout:
    """Return the time limit of a database call on `session`, to be entered with `async with`.

    Args:
        session: Its `info["timeout"]` is the limit, in seconds; 5 where it does not say.
    """
    return asyncio.timeout(session.info.get("timeout", TIMEOUT_SECONDS))


async def _store(session: AsyncSession, statement: str, values: tuple[Any, ...]) -> None:
    try:
        async with deadline(session):
            if session.in_transaction():
                await (await session.connection()).exec_driver_sql(statement, values)
            elif isinstance(session.bind, AsyncEngine):
                # In turn: when a connection comes back to SQLAlchemy's pool, whoever asks just then takes it, and who
                # was waiting for it waits again, behind everybody else.
                async with session.info.get("turns", _NO_TURNS):
                    await _store_autocommit(session.bind, statement, values)
            else:  # bound to one connection, as tests do that roll everything back
                async with session.begin():
                    await (await session.connection()).exec_driver_sql(statement, values)
    except DATABASE_ERRORS as error:
        # `from None`: a traceback would print the original's text.
        raise database_error(error) from None


async def _store_autocommit(engine: AsyncEngine, statement: str, values: tuple[Any, ...]) -> None:
    """Run the statement on a connection of its own, in one round trip: no BEGIN, no COMMIT.

    It is handed to asyncpg as it is. SQLAlchemy keeps the connections; between it and the wire
    there is nothing to compile, and going through it costs as much CPU time again as the statement.
    """
    retrying = False
    while True:
        connection = await _checkout(engine)
        driver: asyncpg.Connection = connection.driver_connection
        try:
            await driver.execute(statement, *values)
            if driver.is_in_transaction():  # somebody's, whose BEGIN was still on its way: not committed
                raise asyncpg.InterfaceError
        except BaseException as error:
            if not isinstance(error, asyncpg.PostgresError) or isinstance(error, asyncpg.InvalidSQLStatementNameError):
                # Cancelled, timed out, cut off: what the connection is in the middle of is unknown. Or somebody has
                # dropped the prepared statements that asyncpg believes to be there (DISCARD ALL).
                # Not closed politely, since a server that hangs would be waited for.
                driver.terminate()
            died = driver.is_closed()
            if died:
                connection.invalidate(error)
            if not died or retrying or not isinstance(error, Exception):
                raise
            # The connection died, maybe long ago. The pool hands out the last one returned first, and
            # an invalidated one reconnects: the second try is on a fresh connection.
            retrying = True
        else:
            return
        finally:
            connection.close()


async def _checkout(engine: AsyncEngine) -> PoolProxiedConnection:
    try:
        # One that idles is had without a switch to a greenlet, which is most of what a checkout costs.
        return engine.sync_engine.raw_connection()
    except MissingGreenlet:
        # None idles. What SQLAlchemy asks a new connection is no part of the trace.
        with suppress_instrumentation():
            return await engine.raw_connection()


def _check_name(field: str, value: str) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= NAME_LENGTH:
        raise InvalidRecordError(field, f"must be a string of 1 to {NAME_LENGTH} characters")


def _check_tokens(field: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= TOKENS_MAX:
        raise InvalidRecordError(field, f"must be an integer of 0 to {TOKENS_MAX}")


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Return `text` with U+FFFD for what PostgreSQL can't store: NUL and lone surrogates.

    Args:
        text: Any string.
    """
    if text.isascii() and "\0" not in text:
        return text
    return _UNSTORABLE.sub("\ufffd", text)


def to_jsonb(payload: Mapping[str, Any]) -> str:
    r"""Return `payload` as JSON that PostgreSQL's `jsonb` takes. Never raises for a value in it.

    NUL and lone surrogates become U+FFFD, in keys too; keys that become equal, as 1 and "1" do, get a
    number; NaN and infinities become null; an integer of more than 4,300 digits hexadecimal text; what
    JSON can't express (UUID, datetime, Decimal, ...) its usual text; bytes that are not UTF-8 base64
    (RFC 4648, section 5); what is nested deeper than 128 levels "[nested too deeply]". A container
    inside itself becomes "[repeated]", and from then on so does every container met again; an object
    that can't be converted "[unserializable <its class>]".

    Args:
        payload: Any mapping.

    Returns:
        The JSON text.
    """
    with contextlib.suppress(Exception):  # of a value's own code, anything
        text = _dumps(payload)
        text.encode()
        # Few payloads need more than these two looks. `[[[` can only be nested as deep as it has brackets.
        if "\\u0000" not in text and text.count("[") + text.count("{") <= DEPTH_MAX:
            return text
    return _dumps(_Cleaner().clean(payload))


# sort_keys, which `jsonb` has no use for, raises where keys are of several types: 1 and "1" are one name in JSON.
_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode


class _Cleaner:
    """Makes a payload of what `jsonb` can store. One for each payload."""

    def __init__(self) -> None:
        # Keyed by `id()`. The container is held too, since a freed object's id is reused.
        self.seen: dict[int, Any] = {}
        self.cyclic = False

    def clean(self, value: Any, depth: int = DEPTH_MAX) -> Any:  # noqa: PLR0911 - one for each kind of value
        """Return `value` made of what JSON has; `depth` is the levels of nesting left."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return clean_text(str.__str__(value))
        if isinstance(value, int):
            return _clean_integer(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        if depth == 0:
            return "[nested too deeply]"
        try:
            if isinstance(value, Mapping | list | tuple):
                return self.clean_container(value, depth)
            return self.clean(_usual_form(value), depth - 1)
        except Exception:  # noqa: BLE001 - whatever a foreign object's own code raises: the rest is stored without it
            return f"[unserializable {type(value).__qualname__}]"

    def clean_container(self, value: Any, depth: int) -> Any:
        if id(value) in self.seen:
            # From here on no container is written twice: a graph would be walked along every path through it.
            self.cyclic = True
            return "[repeated]"
        self.seen[id(value)] = value
        try:
            if isinstance(value, Mapping):
                return self.clean_mapping(value, depth)
            return [self.clean(item, depth - 1) for item in value]
        finally:
            if not self.cyclic:
                del self.seen[id(value)]

    def clean_mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        cleaned: dict[str, Any] = {}
        for key, item in value.items():
            clean_key = self.clean(key, depth - 1)
            name = clean_key if isinstance(clean_key, str) else _dumps(clean_key)
            while name in cleaned:  # two keys that JSON can't tell apart: neither value is dropped
                name = f"{name}\ufffd{len(cleaned)}"
            cleaned[name] = self.clean(item, depth - 1)
        return cleaned


def _clean_integer(value: int) -> int | str:
    try:
        str(value)
    except ValueError:  # more than 4,300 digits, see `sys.set_int_max_str_digits`
        return hex(value)
    return int(value)


def _usual_form(value: Any) -> Any:
    try:
        return to_jsonable_python(value, serialize_unknown=True, bytes_mode="utf8", inf_nan_mode="constants")
    except ValueError:  # bytes that are not UTF-8; or a cycle, which raises again below
        if isinstance(value, BaseModel):  # which go by a setting of the model's
            return value.model_dump()
        return to_jsonable_python(value, serialize_unknown=True, bytes_mode="base64", inf_nan_mode="constants")
