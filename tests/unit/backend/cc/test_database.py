import asyncio
import contextlib
import gc
import json
import logging
import warnings
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from uuid import UUID

import asyncpg
import asyncpg.connection
import pytest
from sqlalchemy import AdaptedConnection, event, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseError, DatabaseUnavailableError
from backend.cc.records import EventRecord, PromptRecord, Record
from backend.cc.services.logging import log_l1

EVENT = EventRecord("tool.called", {"n": 1})
PROMPT = PromptRecord("user", "hello")

Begin = Callable[[AsyncSession], AbstractAsyncContextManager[object]]

alone_and_joined = pytest.mark.parametrize(
    "begin", [contextlib.nullcontext, AsyncSession.begin], ids=["alone", "joined"]
)


async def events(db: asyncpg.Connection) -> set[UUID]:
    return {row["base_log_id"] for row in await db.fetch("SELECT base_log_id FROM mem0_cc.event_log")}


# The encoding


@pytest.mark.parametrize("asks", ["URL", "database", "role"])
@alone_and_joined
async def test_text_is_stored_as_it_is_whatever_encoding_is_asked_for(
    database_url: str, db: asyncpg.Connection, asks: str, begin: Begin
) -> None:
    name, role = make_url(database_url).database, f"latin1_of_{make_url(database_url).database}"
    await db.execute(f"CREATE ROLE {role} SUPERUSER LOGIN")
    url = database_url.replace("postgres@", f"{role}@", 1)
    if asks == "URL":
        url += "&options=-c%20client_encoding%3Dlatin1"
    else:
        await db.execute(f"ALTER {asks} {name if asks == 'database' else role} SET client_encoding = 'LATIN1'")
    async with Database(Settings(database_url=url)) as database, database.session() as session, begin(session):
        await log_l1(session, EventRecord("日本", {"x": "日本"}))
    await db.execute(f"DROP ROLE {role}")
    event_type, payload = await db.fetchrow("SELECT event_type, payload FROM mem0_cc.event_log")
    assert (event_type, json.loads(payload)) == ("日本", {"x": "日本"})


# A row that is suppressed

TRIGGER = """
    CREATE FUNCTION suppress() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER suppress BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION suppress()
"""
RULE = "CREATE RULE suppress AS ON INSERT TO {} DO INSTEAD NOTHING"


@pytest.mark.parametrize("suppress", [TRIGGER, RULE], ids=["trigger", "rule"])
@pytest.mark.parametrize(("record", "table"), [(PROMPT, "prompt_trace"), (EVENT, "event_log"), (EVENT, "base_log")])
@alone_and_joined
async def test_a_suppressed_row_is_an_error_at_the_first_try(
    database: Database, db: asyncpg.Connection, *, suppress: str, record: Record, table: str, begin: Begin
) -> None:
    await db.execute(suppress.format(f"mem0_cc.{table}"))
    with pytest.raises(DatabaseError) as raised:
        async with database.session() as session, begin(session):
            await log_l1(session, record)
    assert not isinstance(raised.value, DatabaseUnavailableError)
    assert raised.value.record_id is not None


async def test_the_error_of_a_suppressed_child_row_names_its_cause(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    await db.execute(TRIGGER.format("mem0_cc.event_log"))
    with pytest.raises(DatabaseError, match="^a trigger or a rule has suppressed the record$"):
        await log_l1(session, EVENT)


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


# A session that no `Database` made


@alone_and_joined
async def test_another_engines_session_is_refused_and_nothing_is_written(
    database_url: str, db: asyncpg.Connection, begin: Begin
) -> None:
    engine = create_async_engine(make_url(database_url).set(drivername="postgresql+asyncpg"))
    with pytest.raises(ValueError, match=r"^the session must be one of Database.session\(\)$"):
        async with AsyncSession(engine) as session, begin(session):
            await log_l1(session, EVENT)
    await engine.dispose()
    assert await events(db) == set()


# Event loops


async def log(database: Database) -> None:
    async with database.session() as session:
        await log_l1(session, EVENT)


def log_in_two_loops(database: Database, *, close_first: bool) -> None:
    with asyncio.Runner() as first:
        first.run(log(database))
        if close_first:
            first.close()
        with asyncio.Runner() as second, pytest.raises(DatabaseError, match="a Database belongs to one event loop"):
            second.run(log(database))
        if not close_first:
            first.run(log(database))
            first.run(database.aclose())


def test_a_second_event_loop_is_told_to_make_another_database_and_harms_nothing(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    log_in_two_loops(Database(settings), close_first=False)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_second_event_loop_is_told_the_same_where_the_first_is_closed(settings: Settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the connection of a closed loop is left to the collector
        log_in_two_loops(Database(settings), close_first=True)
        gc.collect()


# A pooler without prepared statements: another client has prepared a statement of the same name


def take_names(driver: asyncpg.Connection, count: int) -> Awaitable[object]:
    """Prepare statements of the names that asyncpg is about to use."""
    first = asyncpg.connection._uid + 1
    names = [f"__asyncpg_stmt_{number:x}__" for number in range(first, first + count)]
    return driver.execute("; ".join(f'PREPARE "{name}" AS SELECT 1' for name in names))  # type: ignore[no-any-return]


async def driver_of(session: AsyncSession) -> asyncpg.Connection:
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def test_a_statement_whose_name_is_taken_is_tried_once_more_on_another_connection(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    driver = await driver_of(session)
    await session.rollback()
    await take_names(driver, 1)
    record_id = await log_l1(session, EVENT)
    assert driver.is_closed()
    assert await events(db) == {record_id}


async def test_where_every_connection_has_the_name_already_the_error_names_a_pooler(database: Database) -> None:
    connections = []

    @event.listens_for(database._engine.sync_engine, "connect")
    def connected(connection: AdaptedConnection, _: object) -> None:
        connections.append(connection)
        connection.run_async(lambda driver: take_names(driver, 2))

    async with database.session() as session:
        with pytest.raises(DatabaseUnavailableError, match="42P05.: is there a pooler without prepared statements"):
            await log_l1(session, EVENT)
    assert len(connections) == 2


async def test_in_a_transaction_a_name_that_is_taken_is_an_outage_and_costs_the_connection(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    driver = await driver_of(session)
    await take_names(driver, 1)
    with pytest.raises(DatabaseUnavailableError, match="42P05"):
        await log_l1(session, EVENT)
    await session.rollback()
    assert driver.is_closed()
    assert await events(db) == set()
