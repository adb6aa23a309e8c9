import asyncio
import contextlib
import json
import logging
import traceback
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY
from uuid import UUID, uuid4

import asyncpg
import logfire
import pytest
import uvloop
from opentelemetry import trace
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, format_trace_id
from pytest_benchmark.fixture import BenchmarkFixture
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseError, DatabaseUnavailableError
from backend.cc.mem0_models import BaseLog
from backend.cc.records import EventRecord, PromptRecord, Record
from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT, log_l1
from common.logger_logfire import configure_logfire
from common.request_id_middleware import request_id_var
from support.refusals import REFUSALS, carried_by
from support.sessions import Begin, alone_and_joined
from support.wire import counted

PROMPT = PromptRecord("user", "What is the capital of France?", tokens_in=9, tokens_out=0)
EVENT = EventRecord("tool.called", {"tool": "search", "hits": [1, 2]})
SECRET = "a prompt nobody may read"

each_kind = pytest.mark.parametrize("record", [PROMPT, EVENT], ids=["prompt", "event"])


@pytest.fixture
def spans() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    configure_logfire("cos-cc", span_processors=[SimpleSpanProcessor(exporter)])
    return exporter


# What is written


async def test_a_prompt_is_a_base_row_and_its_prompt_row(session: AsyncSession, db: asyncpg.Connection) -> None:
    before = datetime.now(UTC)
    record_id = await log_l1(session, PROMPT, request_id="req-1")
    base = await db.fetchrow("SELECT * FROM mem0_cc.base_log")
    assert dict(base) == {
        "id": record_id,
        "timestamp": ANY,
        "source_module": "cc",
        "request_id": "req-1",
        "trace_id": ANY,
    }
    assert before <= base["timestamp"] <= datetime.now(UTC)
    assert dict(await db.fetchrow("SELECT * FROM mem0_cc.prompt_trace")) == {
        "base_log_id": record_id,
        "role": "user",
        "content": "What is the capital of France?",
        "tokens_in": 9,
        "tokens_out": 0,
    }


async def test_an_event_is_a_base_row_and_its_event_row(session: AsyncSession, db: asyncpg.Connection) -> None:
    record_id = await log_l1(session, EVENT)
    assert await db.fetchval("SELECT id FROM mem0_cc.base_log") == record_id
    event = await db.fetchrow("SELECT base_log_id, event_type, payload::text FROM mem0_cc.event_log")
    assert tuple(event) == (record_id, "tool.called", '{"hits": [1, 2], "tool": "search"}')


async def test_ids_are_uuid7_in_the_order_of_their_calls(session: AsyncSession) -> None:
    ids = [await log_l1(session, EVENT) for _ in range(20)]
    assert {record_id.version for record_id in ids} == {7}
    assert ids == sorted(ids)


@each_kind
async def test_a_record_is_one_statement_and_one_round_trip(database_url: str, record: Record) -> None:
    with counted(database_url) as wire:
        async with Database(Settings(database_url=wire.url)) as database, database.session() as session:
            await log_l1(session, record)  # connects and prepares
            wire.messages.clear()
            for _ in range(5):
                await log_l1(session, record)
            assert wire.messages == {b"B": 5, b"E": 5, b"S": 5}  # Bind, Execute, Sync


async def test_nul_and_lone_surrogates_become_replacement_characters(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    bad, good = "a\0b\ud800c\udfffd😀é", "a\ufffdb\ufffdc\ufffdd😀é"
    prompt = await log_l1(session, PromptRecord(bad, bad), request_id=bad)
    await log_l1(session, EventRecord(bad, {bad: bad}))
    assert await db.fetchval("SELECT request_id FROM mem0_cc.base_log WHERE id = $1", prompt) == good
    assert tuple(await db.fetchrow("SELECT role, content FROM mem0_cc.prompt_trace")) == (good, good)
    event_type, payload = await db.fetchrow("SELECT event_type, payload FROM mem0_cc.event_log")
    assert (event_type, json.loads(payload)) == (good, {good: good})


# What is refused before anything is written


@pytest.mark.parametrize("request_id", ["", "r" * 256])
async def test_a_wrong_request_id_is_a_value_error(session: AsyncSession, request_id: str) -> None:
    with pytest.raises(ValueError, match="^request_id"):
        await log_l1(session, EVENT, request_id=request_id)


@pytest.mark.parametrize("record", [{"role": "user", "content": "hello"}, None, PromptRecord])
async def test_what_is_no_record_is_a_value_error(session: AsyncSession, record: Any) -> None:
    with pytest.raises(ValueError, match="^record must be a PromptRecord or an EventRecord$"):
        await log_l1(session, record)


async def test_a_session_on_another_driver_is_a_value_error_that_names_it() -> None:
    driver = SimpleNamespace(paramstyle="qmark", sqlite_version_info=(3, 45), has_stop=True)  # enough for a dialect
    engine = create_async_engine("sqlite+aiosqlite://", module=driver)
    with pytest.raises(ValueError, match="^log_l1 needs a session on PostgreSQL through asyncpg, not aiosqlite$"):
        await log_l1(AsyncSession(engine), EVENT)


# Ids and spans


async def test_the_request_id_is_the_current_requests_and_outside_any_a_fresh_one(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    token = request_id_var.set("of-this-request")
    await log_l1(session, EVENT)
    request_id_var.reset(token)
    await log_l1(session, EVENT)
    await log_l1(session, EVENT)
    first, *others = [row[0] for row in await db.fetch("SELECT request_id FROM mem0_cc.base_log ORDER BY id")]
    assert first == "of-this-request"
    assert {UUID(request_id).version for request_id in others} == {4}
    assert len(set(others)) == 2
    assert request_id_var.get() is None


@pytest.mark.parametrize(
    ("record", "table", "event_type", "statement"),
    [(PROMPT, "prompt_trace", "prompt_trace", INSERT_PROMPT), (EVENT, "event_log", "tool.called", INSERT_EVENT)],
    ids=["prompt", "event"],
)
async def test_the_row_and_its_span_carry_the_same_ids(
    session: AsyncSession,
    db: asyncpg.Connection,
    spans: InMemorySpanExporter,
    *,
    record: Record,
    table: str,
    event_type: str,
    statement: str,
) -> None:
    token = request_id_var.set("of-this-request")
    with trace.get_tracer("test").start_as_current_span("caller"):
        trace_id = format_trace_id(trace.get_current_span().get_span_context().trace_id)
        record_id = await log_l1(session, record, request_id="of-another-one")
    request_id_var.reset(token)
    span, caller = spans.get_finished_spans()
    assert dict(span.attributes or {}) == {
        "layer": "service",
        "db.system.name": "postgresql",
        "db.operation.name": "INSERT",
        "db.collection.name": f"mem0_cc.{table}",
        "db.query.summary": f"INSERT mem0_cc.base_log INSERT mem0_cc.{table}",
        "db.query.text": statement,
        "request_id": "of-another-one",
        "mem0.event_type": event_type,
        "mem0.record_id": str(record_id),
        "logfire.msg": f"log_l1 {event_type}",
        "logfire.span_type": "span",
    }
    assert (span.name, span.kind, span.parent) == (f"log_l1 {table}", SpanKind.CLIENT, caller.context)
    assert span.status.is_unset
    assert (caller.attributes or {})["request_id"] == "of-this-request"
    row = await db.fetchrow("SELECT request_id, trace_id FROM mem0_cc.base_log WHERE id = $1", record_id)
    assert tuple(row) == ("of-another-one", trace_id)


async def test_the_row_has_a_trace_id_if_nothing_is_recorded(session: AsyncSession, db: asyncpg.Connection) -> None:
    configure_logfire("cos-cc")
    await log_l1(session, EVENT)
    trace_id = await db.fetchval("SELECT trace_id FROM mem0_cc.base_log")
    assert int(trace_id, 16) > 0
    assert len(trace_id) == 32


@pytest.mark.parametrize("flags", [trace.TraceFlags.DEFAULT, trace.TraceFlags.SAMPLED], ids=["dropped", "sampled"])
async def test_a_trace_that_began_elsewhere_gives_the_row_its_id_and_is_recorded_here_if_it_is_there(
    session: AsyncSession, db: asyncpg.Connection, spans: InMemorySpanExporter, flags: int
) -> None:
    parent = trace.SpanContext(2**127, 2**63, is_remote=True, trace_flags=trace.TraceFlags(flags))
    with trace.use_span(trace.NonRecordingSpan(parent)):
        await log_l1(session, EVENT)
    assert await db.fetchval("SELECT trace_id FROM mem0_cc.base_log") == f"{2**127:032x}"
    assert [span.parent for span in spans.get_finished_spans()] == [parent] * flags


SUPPRESS = """
CREATE FUNCTION suppress() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER suppress BEFORE INSERT ON mem0_cc.{} FOR EACH ROW EXECUTE FUNCTION suppress()"""


@pytest.mark.parametrize(
    ("statement", "code"),
    [("DROP SCHEMA mem0_cc CASCADE", "42P01"), (SUPPRESS.format("event_log"), "suppressed")],
)
async def test_the_span_of_a_refused_record_says_why_and_no_more(
    session: AsyncSession, db: asyncpg.Connection, spans: InMemorySpanExporter, statement: str, code: str
) -> None:
    await db.execute(statement)
    with pytest.raises(DatabaseError):
        await log_l1(session, EVENT)
    (span,) = spans.get_finished_spans()
    attributes = span.attributes or {}
    assert attributes["error.type"] == code
    assert attributes.get("db.response.status_code") == (code if code == "42P01" else None)
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, None)
    assert span.events == ()


async def test_the_span_of_a_cancelled_record_says_so_and_the_record_is_written_all_the_same(
    session: AsyncSession, db: asyncpg.Connection, spans: InMemorySpanExporter
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.base_log")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(log_l1(session, EVENT), 0.2)
    (span,) = spans.get_finished_spans()
    assert (span.attributes or {})["error.type"] == "CancelledError"
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.events == ()
    await log_l1(session, EVENT)  # the first one has been queued before it
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.event_log") == 2


async def test_with_asyncpg_instrumented_a_joined_statement_is_a_child_of_the_span(
    session: AsyncSession, spans: InMemorySpanExporter
) -> None:
    async with session.begin():
        await log_l1(session, EVENT)  # connects
        spans.clear()
        logfire.instrument_asyncpg()
        try:
            await log_l1(session, EVENT)
        finally:
            AsyncPGInstrumentor().uninstrument()  # type: ignore[no-untyped-call]
    *_, statement, span = spans.get_finished_spans()
    assert statement.parent == span.context
    assert "db.statement.parameters" not in (statement.attributes or {})


# If the database doesn't do it


@pytest.mark.parametrize(
    ("change", "unavailable"),
    [
        ("ALTER DATABASE {name} SET default_transaction_read_only = on", True),
        ("DROP SCHEMA mem0_cc CASCADE", False),
        (REFUSALS["check"], False),
        (REFUSALS["trigger"], False),
    ],
    ids=["read-only", "no schema", "check", "trigger"],
)
@alone_and_joined
async def test_a_refusal_is_an_error_that_carries_nothing_of_the_row(
    session: AsyncSession,
    db: asyncpg.Connection,
    caplog: pytest.LogCaptureFixture,
    *,
    change: str,
    unavailable: bool,
    begin: Begin,
) -> None:
    caplog.set_level(logging.DEBUG)
    await db.execute(change.format(name=await db.fetchval("SELECT current_database()")))
    with pytest.raises(DatabaseError) as raised:
        async with begin(session):
            await log_l1(session, PromptRecord("user", SECRET))
    assert isinstance(raised.value, DatabaseUnavailableError) is unavailable
    assert "SQLSTATE" in str(raised.value)
    assert carried_by(raised.value) == [raised.value]
    assert SECRET not in "".join(traceback.format_exception(raised.value)) + caplog.text


@alone_and_joined
@pytest.mark.parametrize(("record", "table"), [(PROMPT, "prompt_trace"), (EVENT, "event_log"), (EVENT, "base_log")])
async def test_a_record_that_a_trigger_suppresses_is_an_error(
    session: AsyncSession, db: asyncpg.Connection, begin: Begin, record: Record, table: str
) -> None:
    await db.execute(SUPPRESS.format(table))
    with pytest.raises(DatabaseError) as raised:
        async with begin(session):
            await log_l1(session, record)
    assert not isinstance(raised.value, DatabaseUnavailableError)


@pytest.mark.parametrize(("state", "unavailable"), [("53100", True), ("XX000", True), ("23514", False)])
async def test_what_fails_at_the_commit_is_not_acknowledged(
    session: AsyncSession, db: asyncpg.Connection, state: str, *, unavailable: bool
) -> None:
    await db.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '%', NEW USING ERRCODE = '{state}'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON mem0_cc.event_log DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION refuse()""")
    with pytest.raises(DatabaseError, match=state) as raised:
        await log_l1(session, EVENT)
    assert isinstance(raised.value, DatabaseUnavailableError) is unavailable
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 0


async def test_a_record_in_a_transaction_that_has_failed_says_so(session: AsyncSession) -> None:
    with contextlib.suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))
    with pytest.raises(DatabaseError, match="25P02.*: an earlier statement of the transaction has failed") as raised:
        await log_l1(session, EVENT)
    assert not isinstance(raised.value, DatabaseUnavailableError)


async def test_a_session_that_cannot_be_used_is_an_error_of_its_own_kind(session: AsyncSession) -> None:
    session.add(BaseLog(id=uuid4()))
    with pytest.raises(DBAPIError, match="null value"):
        await session.flush()
    with pytest.raises(DatabaseError, match="PendingRollbackError") as raised:
        await log_l1(session, EVENT)
    assert not isinstance(raised.value, DatabaseUnavailableError)


async def test_a_joined_record_is_bounded_in_time_and_its_connection_replaced(
    database_url: str, db: asyncpg.Connection
) -> None:
    settings = Settings(database_url=database_url, cc_db_timeout_seconds=0.3, cc_db_pool_size=1)
    async with Database(settings) as database, database.session() as session:
        async with db.transaction():
            await db.execute("LOCK TABLE mem0_cc.base_log")
            with pytest.raises(DatabaseUnavailableError, match="TimeoutError"):
                async with session.begin():
                    await log_l1(session, EVENT)
        async with session.begin():
            await log_l1(session, EVENT)


# Latency, reported and not asserted: `./scripts/bench` compares it


@each_kind
@pytest.mark.timing
@pytest.mark.benchmark(group="one durable record")
def test_latency_of_log_l1(benchmark: BenchmarkFixture, settings: Settings, record: Record) -> None:
    configure_logfire("cos-cc")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        database = Database(settings)
        session = database.session()
        runner.run(log_l1(session, record))
        benchmark.pedantic(lambda: runner.run(log_l1(session, record)), rounds=200, warmup_rounds=20)  # type: ignore[no-untyped-call]
        runner.run(database.aclose())
