import asyncio
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import STALE_CONNECTION, DatabaseError, DatabaseUnavailableError
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1
from devtools.waiting import until
from support.cluster import waiting

EVENT = EventRecord("tool.called", {"n": 1})


async def events(db: asyncpg.Connection) -> set[UUID]:
    return {row["base_log_id"] for row in await db.fetch("SELECT base_log_id FROM mem0_cc.event_log")}


async def driver_of(session: AsyncSession) -> asyncpg.Connection:
    return (await (await session.connection()).get_raw_connection()).driver_connection


# A connection that can't be used any more


async def test_a_connection_known_to_be_closed_is_not_handed_out(session: AsyncSession) -> None:
    driver = await driver_of(session)
    await session.rollback()
    driver.terminate()
    assert (await session.execute(text("SELECT 1"))).scalar_one() == 1


async def test_a_transaction_that_somebody_left_on_the_connection_costs_no_record(
    database: Database, db: asyncpg.Connection
) -> None:
    async with database.session() as session:
        driver = await driver_of(session)
        await session.rollback()
        await driver.execute("BEGIN")
    async with database.session() as session, session.begin():
        record_id = await log_l1(session, EVENT)
    assert driver.is_closed()
    assert await events(db) == {record_id}


@pytest.mark.parametrize("state", sorted(STALE_CONNECTION))
async def test_a_connection_that_a_switchover_or_a_pooler_has_spoilt_is_an_outage_and_replaced(
    database: Database, db: asyncpg.Connection, state: str
) -> None:
    """A read-only server has spoilt the others, too: all of them lead there."""
    await db.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '{state}'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON mem0_cc.event_log FOR EACH ROW EXECUTE FUNCTION refuse()""")
    async with database.session() as session, database.session() as other:
        driver, others = await driver_of(session), await driver_of(other)
        await other.rollback()
        with pytest.raises(DatabaseUnavailableError, match=state):
            await log_l1(session, EVENT)
        await session.rollback()
        await db.execute("DROP FUNCTION refuse CASCADE")
        async with session.begin(), other.begin():
            now = {await driver_of(session), await driver_of(other)}
            assert driver.is_closed()
            assert (others in now) == (state != "25006")


# A session that concurrent tasks share, which SQLAlchemy forbids


@pytest.mark.parametrize("delay", [0, 0.002])
async def test_a_record_in_a_transaction_that_another_task_ends_is_committed_or_an_error(
    database: Database, db: asyncpg.Connection, delay: float
) -> None:
    returned: set[UUID] = set()
    errors: list[str] = []

    async def begin_and_commit(session: AsyncSession, delay: float) -> None:
        async with session.begin():
            await asyncio.sleep(delay)

    async def log_twice(session: AsyncSession) -> set[UUID]:
        ids = set()
        for _ in range(2):
            try:
                ids.add(await log_l1(session, EVENT))
            except DatabaseError as error:
                errors.append(error.code)
        return ids

    for number in range(200):
        async with database.session() as session:
            committed, *ids = await asyncio.gather(
                begin_and_commit(session, delay * (number % 10) / 10),
                log_twice(session),
                log_twice(session),
                return_exceptions=True,
            )
        # Records that joined a transaction roll back with it. Its owner has got the error then.
        if committed is None:
            returned.update(*ids)  # type: ignore[arg-type]
    assert "shared" in errors
    assert returned
    assert returned <= await events(db)


# Event loops


async def log_and_query(database: Database) -> None:
    async with database.session() as session:
        await log_l1(session, EVENT)
        await session.execute(text("SELECT 1"))


def test_a_database_that_was_closed_can_be_used_again_in_the_same_loop_and_in_another(settings: Settings) -> None:
    database = Database(settings)
    for _ in range(2):
        with asyncio.Runner() as runner:
            for _ in range(2):
                runner.run(log_and_query(database))
                runner.run(database.aclose())
                runner.run(database.aclose())


async def test_a_second_loop_while_the_first_runs_is_told_to_make_another_database_and_harms_nothing(
    database: Database, db: asyncpg.Connection
) -> None:
    await log_and_query(database)
    with pytest.raises(DatabaseError, match="^another event loop uses this Database: make one for each$"):
        await asyncio.to_thread(asyncio.run, log_and_query(database))
    await asyncio.to_thread(asyncio.run, database.aclose())
    await log_and_query(database)
    assert len(await events(db)) == 2


async def test_what_the_engine_alone_has_opened_is_closed_too(settings: Settings, database_url: str) -> None:
    database = Database(settings)
    async with database.engine.connect() as connection:
        pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        assert await database.session(bind=connection).scalar(text("SELECT pg_backend_pid()")) == pid
    await database.aclose()
    await asyncio.to_thread(until, lambda: not waiting(database_url, f"pid = {pid}"))


def test_a_session_may_be_made_before_the_loop_runs(settings: Settings) -> None:
    database = Database(settings)
    session = database.session()
    with asyncio.Runner() as runner:
        runner.run(log_l1(session, EVENT))
        runner.run(database.aclose())
