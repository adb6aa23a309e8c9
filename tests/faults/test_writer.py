"""The writer on a real server: a record that is bad, large or slow costs no other anything."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import zip_longest
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import SecretStr

import backend.cc.writer
from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseError, DatabaseUnavailableError
from backend.cc.records import EventRecord, PromptRecord, Record
from backend.cc.services.logging import log_l1
from support.cluster import SLACK, Postgres

SECONDS = 2.0
EVENT = EventRecord("good", {})

POISON = """
    CREATE FUNCTION mem0_cc.poison() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.event_type = 'is suppressed' THEN RETURN NULL; END IF;
        IF NEW.event_type = 'kills' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
        IF NEW.event_type = 'hangs' THEN PERFORM pg_sleep(60); END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER poison BEFORE INSERT ON mem0_cc.event_log FOR EACH ROW EXECUTE FUNCTION mem0_cc.poison();
    ALTER TABLE mem0_cc.event_log ADD CONSTRAINT poison CHECK (event_type <> 'is refused')
"""
ANTIDOTE = """
    DROP TRIGGER poison ON mem0_cc.event_log;
    DROP FUNCTION mem0_cc.poison;
    ALTER TABLE mem0_cc.event_log DROP CONSTRAINT poison
"""
BACKENDS = """SELECT array_agg(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE '%INTO mem0_cc.event_log%' AND pid <> pg_backend_pid()"""
COUNT = "SELECT count(*) FROM mem0_cc.event_log"
OTHERS = "datname = current_database() AND pid <> pg_backend_pid()"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def new(url: str, seconds: float = SECONDS, pool_size: int = 10) -> Database:
    return Database(Settings(database_url=SecretStr(url), cc_db_timeout_seconds=seconds, cc_db_pool_size=pool_size))


@pytest.fixture
async def database(postgres: Postgres, database_url: str) -> AsyncIterator[Database]:
    async with new(database_url) as database:
        yield database


@pytest.fixture
async def db(postgres: Postgres, database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def calls(database: Database, records: Sequence[Record], ids: Sequence[UUID] = ()) -> list[asyncio.Task[UUID]]:
    """Start a call of `log_l1` for each record."""
    session = database.session()  # it opens no connection, so nobody has to close it
    each = zip_longest(records, ids)
    return [asyncio.create_task(log_l1(session, record, record_id=record_id)) for record, record_id in each]


async def outcomes(tasks: Iterable[asyncio.Task[UUID]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def stored(db: asyncpg.Connection, ids: Iterable[object]) -> set[UUID]:
    """Return which of the records are there, whole."""
    rows = await db.fetch(
        """SELECT id FROM mem0_cc.base_log WHERE id = ANY($1) AND (
            EXISTS (SELECT FROM mem0_cc.event_log WHERE base_log_id = id)
            OR EXISTS (SELECT FROM mem0_cc.prompt_trace WHERE base_log_id = id))""",
        list(ids),
    )
    return {row["id"] for row in rows}


@asynccontextmanager
async def transaction(url: str, statement: str) -> AsyncIterator[None]:
    """Another client's, with one statement."""
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await connection.execute(statement)
        yield
    await connection.close()


async def fetches(db: asyncpg.Connection, query: str, is_expected: Callable[[Any], bool]) -> None:
    """Return when a query has the result that is expected."""
    async with asyncio.timeout(15):
        while not is_expected(await db.fetchval(query)):  # noqa: ASYNC110 - the server notifies nobody
            await asyncio.sleep(0.01)


# One bad record


@pytest.mark.parametrize(
    ("bad", "error", "code"),
    [
        ("is refused", DatabaseError, "23514"),
        ("is suppressed", DatabaseError, "suppressed"),
        ("kills", DatabaseUnavailableError, None),
        ("hangs", DatabaseUnavailableError, "TimeoutError"),
    ],
)
async def test_a_bad_record_among_64_fails_alone(
    database: Database, db: asyncpg.Connection, bad: str, error: type[DatabaseError], code: str | None
) -> None:
    await db.execute(POISON)
    try:
        ends = await outcomes(calls(database, [EventRecord(bad if each == 20 else "good", {}) for each in range(64)]))
    finally:
        await db.execute(ANTIDOTE)
    failure = ends.pop(20)
    assert type(failure) is error
    assert code in (None, failure.code)
    assert await stored(db, ends) == set(ends)
    assert not await stored(db, [failure.record_id])


# A server that waits, or freezes


async def test_each_of_200_calls_ends_in_time_on_a_frozen_server_and_all_is_well_when_it_is_thawed(
    postgres: Postgres, database: Database, db: asyncpg.Connection
) -> None:
    async def call(number: int) -> tuple[type, float]:
        await asyncio.sleep(number / 200 * SECONDS * 0.8)  # the last ones arrive when the first are about to end
        started = time.monotonic()
        [end] = await outcomes(calls(database, [EVENT]))
        return type(end), time.monotonic() - started

    await asyncio.gather(*calls(database, [EVENT] * 64))
    postgres.freeze()
    try:
        ends, durations = zip(*await asyncio.gather(*map(call, range(200))), strict=True)
    finally:
        postgres.thaw()
    assert set(ends) == {DatabaseUnavailableError}
    assert max(durations) < SECONDS + SLACK / 2
    ids = await asyncio.gather(*calls(database, [EVENT] * 200))
    assert await stored(db, ids) == set(ids)


async def test_a_record_that_waits_for_another_transactions_row_holds_up_no_stranger(
    database_url: str, postgres: Postgres, db: asyncpg.Connection
) -> None:
    record_id = uuid4()
    async with new(database_url, pool_size=2) as database:
        async with transaction(
            database_url, f"INSERT INTO mem0_cc.base_log VALUES ('{record_id}', now(), 'cc', 'r', 't')"
        ):
            [waiting] = calls(database, [EVENT], [record_id])
            await fetches(db, WAITING, lambda count: count == 1)
            ids = await asyncio.gather(*calls(database, [EVENT] * 64))
            assert not waiting.done()
        assert await waiting == record_id
    assert await stored(db, [record_id, *ids]) == {record_id, *ids}


async def test_no_more_than_so_many_records_wait(
    database_url: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.cc.writer, "QUEUE_MAX", 100)
    async with new(database_url, 10, pool_size=1) as database:
        async with transaction(database_url, "LOCK TABLE mem0_cc.base_log"):
            [first] = calls(database, [EVENT])
            await fetches(db, WAITING, lambda count: count == 1)
            tasks = calls(database, [EVENT] * 110)
            done, waiting = await asyncio.wait(tasks, timeout=0.1)
            assert {end.code for end in await outcomes(done)} == {"QueueFull"}
            assert len(waiting) == 100
        ids = {await first, *await asyncio.gather(*waiting)}
    assert await stored(db, ids) == ids


async def test_a_record_of_50_mb_holds_up_no_small_one(database_url: str, db: asyncpg.Connection) -> None:
    async with new(database_url, 15) as database:
        [large] = calls(database, [PromptRecord("user", "x" * 50_000_000)])
        ids = await asyncio.gather(*calls(database, [EVENT] * 64))
        assert not large.done()
        ids.append(await large)
    assert await stored(db, ids) == set(ids)


# Callers that retry, leave, or close


async def test_two_processes_that_retry_the_same_ids_in_opposite_orders_never_deadlock(
    database_url: str, db: asyncpg.Connection
) -> None:
    ids = [uuid4() for _ in range(300)]

    async def retry(ids: list[UUID]) -> list[UUID]:
        async with new(database_url, 10) as database:
            return await asyncio.gather(*calls(database, [EVENT] * len(ids), ids))

    loops = [asyncio.to_thread(asyncio.run, retry(each)) for each in (ids, ids[::-1])]
    assert await asyncio.gather(*loops) == [ids, ids[::-1]]
    assert await stored(db, ids) == set(ids)


async def test_500_callers_that_are_cancelled_cost_no_record_and_no_connection(
    database: Database, db: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.gather(*calls(database, [EVENT] * 500))
    before = set(await db.fetchval(BACKENDS))
    total = await db.fetchval(COUNT)
    for _ in range(5):
        tasks = calls(database, [EVENT] * 100)
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.sleep(0)
        for task in tasks[1::2]:
            task.cancel()
        assert {type(end) for end in await outcomes(tasks)} == {asyncio.CancelledError}
    await fetches(db, COUNT, lambda count: count == total + 500)
    assert set(await db.fetchval(BACKENDS)) >= before
    gc.collect()
    assert not caplog.records


async def test_what_is_queued_is_written_before_the_writer_is_closed(
    database: Database, db: asyncpg.Connection
) -> None:
    for _ in range(3):  # and it can be used again
        tasks = calls(database, [EVENT] * 500)
        await asyncio.sleep(0)
        await database.aclose()
        ids = {task.result() for task in tasks}
        assert await stored(db, ids) == ids
        await fetches(db, BACKENDS, lambda pids: pids is None)


async def test_no_record_fails_when_every_connection_ends_at_once_under_load(
    database: Database, db: asyncpg.Connection
) -> None:
    ids: list[UUID] = []

    async def caller() -> None:
        for _ in range(100):
            ids.append(await log_l1(database.session(), EVENT))  # noqa: PERF401 - others look at it meanwhile

    callers = asyncio.gather(*(caller() for _ in range(128)))
    for _ in range(4):
        before = len(ids)
        async with asyncio.timeout(15):
            while len(ids) < before + 1_000:  # noqa: ASYNC110 - many are under way
                await asyncio.sleep(0.01)
        await db.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OTHERS}")
    await callers
    assert await stored(db, ids) == set(ids)


async def test_a_server_that_allows_fewer_connections_than_the_writer_may_open_costs_no_record(
    database_url: str, db: asyncpg.Connection
) -> None:
    await db.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 2; GRANT USAGE ON SCHEMA mem0_cc TO narrow")
    await db.execute("GRANT INSERT ON ALL TABLES IN SCHEMA mem0_cc TO narrow")
    try:
        async with new(database_url.replace("postgres@", "narrow@", 1)) as database:
            ids = await asyncio.gather(*calls(database, [EVENT] * 500))
            assert await stored(db, ids) == set(ids)
    finally:
        await db.execute("DROP OWNED BY narrow; DROP ROLE narrow")
