"""What becomes of records when the primary fails over to a standby, and when it waits for one that is gone."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.records import EventRecord
from backend.cc.services.logging import DatabaseError, log_l1
from devtools.waiting import until
from support.cluster import Postgres, fetch, ids
from support.replication import READ_WRITE, Pair, replicated
from support.wire import counted

POOL = 5
FAILURES = (DatabaseError, SQLAlchemyError, OSError)  # of a record, and of an endpoint's own statement


@pytest.fixture(scope="module")
def lasting_pair(cluster: Postgres, database_url: str) -> Iterator[Pair]:
    with replicated(cluster, database_url) as pair:
        yield pair


@pytest.fixture
def pair(lasting_pair: Pair) -> Iterator[Pair]:
    """A primary and its standby, which the tests share."""
    yield lasting_pair
    lasting_pair.heal()


@pytest.fixture
def pair_to_lose(cluster: Postgres, database_url: str) -> Iterator[Pair]:
    """A pair for a test after which there are two primaries."""
    with replicated(cluster, database_url) as pair:
        yield pair


def connections(url: str, **settings: Any) -> Database:
    return Database(Settings(database_url=SecretStr(url), cc_db_pool_size=POOL, **settings))


async def write(database: Database, record_id: UUID | None = None) -> UUID:
    """Log a record that is committed alone."""
    async with database.session() as session:
        return await log_l1(session, EventRecord("alone", {}), record_id=record_id)


async def join(database: Database, record_id: UUID | None = None) -> UUID:
    """Log a record in a transaction."""
    async with database.session() as session, session.begin():
        return await log_l1(session, EventRecord("joined", {}), record_id=record_id)


async def query(database: Database) -> None:
    """Write with a statement of an endpoint's own."""
    async with database.session() as session, session.begin():
        await session.execute(text("DELETE FROM mem0_cc.base_log WHERE false"))


async def at_once(attempt: Callable[[Database], Awaitable[Any]], database: Database) -> None:
    """Do something on all connections."""
    await asyncio.gather(*(attempt(database) for _ in range(POOL)))


async def read_everywhere(database: Database) -> None:
    """Open every connection that the sessions may have."""
    async with AsyncExitStack() as stack:
        for _ in range(POOL):
            await (await stack.enter_async_context(database.session())).connection()


async def fill_pools(database: Database) -> None:
    """Open every connection that the sessions and the writer may have: a record whose id is given travels alone."""
    await read_everywhere(database)
    await asyncio.gather(*(write(database, uuid4()) for _ in range(POOL)))


class Call(NamedTuple):
    began: float
    ended: float
    record_id: UUID | None  # of an acknowledged record


@asynccontextmanager
async def load(database: Database) -> AsyncIterator[list[Call]]:
    """Keep logging, alone and in transactions, until the block ends. Yields the calls that have ended."""
    calls: list[Call] = []
    over = asyncio.Event()

    async def keep_calling(attempt: Callable[[Database], Awaitable[UUID]]) -> None:
        while not over.is_set():
            began, record_id = time.monotonic(), None
            with contextlib.suppress(*FAILURES):
                record_id = await attempt(database)
            calls.append(Call(began, time.monotonic(), record_id))
            await asyncio.sleep(0.005)

    async with asyncio.TaskGroup() as tasks:
        for attempt in (write, join) * 4:
            tasks.create_task(keep_calling(attempt))
        try:
            yield calls
        finally:
            over.set()


async def many_acknowledged(calls: list[Call], since: float) -> None:
    await asyncio.to_thread(until, lambda: sum(bool(c.record_id) and c.began > since for c in list(calls)) > 50)


def assert_none_failed(calls: list[Call], since: float) -> None:
    began_since = [call for call in calls if call.began > since]
    assert all(call.record_id for call in began_since)
    assert min(call.ended for call in began_since) < since + 1


def acknowledged(calls: list[Call]) -> set[str]:
    return {str(call.record_id) for call in calls if call.record_id}


@pytest.mark.parametrize("synchronous", [False, True], ids=["asynchronous", "synchronous"])
async def test_no_record_fails_once_the_standby_of_a_killed_primary_is_promoted(
    pair_to_lose: Pair, *, synchronous: bool
) -> None:
    pair = pair_to_lose
    if synchronous:
        await asyncio.to_thread(pair.make_synchronous)
    async with connections(pair.both) as database, load(database) as calls:
        await many_acknowledged(calls, since=0)
        await asyncio.to_thread(pair.primary.kill)
        promoted = await asyncio.to_thread(pair.promote)
        await many_acknowledged(calls, since=promoted)
    assert_none_failed(calls, since=promoted)
    kept = calls if synchronous else [call for call in calls if call.began > promoted]
    assert acknowledged(kept) <= await asyncio.to_thread(ids, pair.standby.url)


async def test_no_record_is_lost_when_the_primary_and_its_standby_change_places(pair: Pair) -> None:
    """A primary that stops hands over what it has, so nothing is lost although replication is asynchronous."""
    async with connections(pair.both) as database, load(database) as calls:
        await many_acknowledged(calls, since=0)
        promoted = await asyncio.to_thread(pair.swap)
        await many_acknowledged(calls, since=time.monotonic())
    assert_none_failed(calls, since=promoted)
    for server in (pair.primary, pair.standby):
        await asyncio.to_thread(until, lambda url=server.url: acknowledged(calls) <= ids(url))


async def test_no_record_fails_after_a_switchover_that_leaves_the_old_primary_read_only(pair_to_lose: Pair) -> None:
    """Neither with two hosts nor behind an address that moves, read-write or not; and sessions leave it, too."""
    pair = pair_to_lose
    async with AsyncExitStack() as stack:
        moving = stack.enter_context(counted(pair.primary.url))
        # A database for each way to find out, because whoever finds out renews the connections for all.
        databases = [
            [await stack.enter_async_context(connections(url)) for _ in range(3)]
            for url in (pair.both, moving.url, f"{moving.url}&{READ_WRITE}")
        ]
        for each in databases:
            await asyncio.gather(*map(fill_pools, each))
        await asyncio.to_thread(pair.switch_over)
        moving.server = pair.standby.url
        for logging, querying, joining in databases:
            written = await asyncio.gather(*(write(logging) for _ in range(3 * POOL)))
            assert set(map(str, written)) <= await asyncio.to_thread(ids, pair.standby.url)
            for attempt, database in ((query, querying), (join, joining)):
                with contextlib.suppress(*FAILURES):  # one may fail, and no more
                    await attempt(database)
                await at_once(attempt, database)


@pytest.mark.parametrize("attributes", ["", f"&{READ_WRITE}"], ids=["any", "read-write"])
async def test_a_service_that_first_met_the_standby_leaves_it_for_the_primary(pair: Pair, attributes: str) -> None:
    with counted(pair.standby.url) as moving:
        async with connections(moving.url + attributes) as database:
            with contextlib.suppress(*FAILURES):
                await read_everywhere(database)
            for attempt in (write, query, join):
                with pytest.raises(FAILURES):
                    await attempt(database)
            with contextlib.suppress(*FAILURES):
                await read_everywhere(database)
            moving.server = pair.primary.url
            await at_once(write, database)
            with contextlib.suppress(*FAILURES):  # one may fail, and no more
                await query(database)
            await at_once(query, database)
            await at_once(join, database)


@pytest.mark.parametrize(
    ("end", "repeat"), [("terminated", write), ("killed", write), ("timed out", write), ("timed out", join)]
)
async def test_a_repeated_record_is_acknowledged_only_once_the_standby_has_it(
    pair: Pair, end: str, repeat: Callable[[Database, UUID | None], Awaitable[UUID]]
) -> None:
    """The first attempt has committed on the primary, and its wait for the standby has ended."""
    url, refused = pair.primary.url, 0
    waits = "wait_event = 'SyncRep' AND backend_type = 'client backend'"

    async def insist() -> UUID:
        nonlocal refused
        record_id = None
        while True:
            try:
                return await (repeat if refused else write)(database, record_id)
            except FAILURES as error:
                record_id = getattr(error, "record_id", None) or record_id
                refused += 1
                await asyncio.sleep(0.01)

    def waiting() -> set[int]:
        with contextlib.suppress(asyncpg.PostgresError, OSError):  # it recovers from the kill
            return {row["pid"] for row in fetch(url, f"SELECT pid FROM pg_stat_activity WHERE {waits}")}
        return set()

    def repeated() -> bool:
        return task.done() or (bool(waiting() - first) and (end != "timed out" or refused > 2))

    await asyncio.to_thread(pair.make_synchronous)
    async with connections(url, cc_db_timeout_seconds=0.2 if end == "timed out" else 10) as database:
        before = await asyncio.to_thread(ids, url)
        pair.standby.freeze()
        task = asyncio.create_task(insist())
        first = await asyncio.to_thread(until, waiting)
        if end == "terminated":
            await asyncio.to_thread(fetch, url, f"SELECT pg_terminate_backend({min(first)})")
        elif end == "killed":
            os.kill(min(first), signal.SIGKILL)
        await asyncio.to_thread(until, repeated)
        assert not task.done()
        [record_id] = await asyncio.to_thread(ids, url) - before
        pair.standby.thaw()
        assert str(await task) == record_id
    assert end != "terminated" or not refused  # the writer's own second attempt is enough
    await asyncio.to_thread(until, lambda: record_id in ids(pair.standby.url))


@asynccontextmanager
async def nothing_commits(pair: Pair, why: str) -> AsyncIterator[None]:
    if why == "no standby":
        await asyncio.to_thread(pair.make_synchronous)
        pair.standby.freeze()
        yield
        pair.standby.thaw()
    else:
        connection = await asyncpg.connect(pair.primary.url)
        try:
            await connection.execute("BEGIN; LOCK TABLE mem0_cc.base_log")
            yield
        finally:
            await connection.close()


@pytest.mark.parametrize(("attempt", "why"), [(write, "locked"), (write, "no standby"), (join, "locked")])
async def test_statements_that_time_out_do_not_pile_up_on_the_server(
    pair: Pair, attempt: Callable[[Database], Awaitable[UUID]], why: str
) -> None:
    seconds, counts = 0.2, [0]
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%INSERT%' AND wait_event_type IN ('Lock', 'IPC')"
    async with (
        connections(pair.primary.url, cc_db_timeout_seconds=seconds) as database,
        nothing_commits(pair, why),
        asyncio.TaskGroup() as tasks,
    ):
        end = time.monotonic() + 6 * seconds

        async def keep_calling() -> None:
            while time.monotonic() < end:
                with contextlib.suppress(*FAILURES):
                    await attempt(database)

        for _ in range(3 * POOL):
            tasks.create_task(keep_calling())
        while time.monotonic() < end:
            counts += [row["count"] for row in await asyncio.to_thread(fetch, pair.primary.url, waiting)]
    assert 0 < max(counts) <= POOL + 5
