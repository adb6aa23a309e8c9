"""When a record is committed, and what a rollback undoes: one row for each kind of session."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import product
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, AsyncTransaction, create_async_engine

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.deps import get_log_l1
from backend.cc.errors import DatabaseError
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1

EVENT = EventRecord("tool.called", {})

# Of each kind of session its engine's options, and whether a record is committed when the call returns: inside a
# transaction, by LogL1 and by log_l1, and outside of any.
CONTRACT: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    "Database's": ({}, True, False, True),
    "another engine's": ({}, False, False, True),
    "another engine's without a pool": ({"poolclass": NullPool}, False, False, True),
    "another engine's, pinged first": ({"pool_pre_ping": True}, False, False, True),
    "another engine's, SERIALIZABLE": ({"isolation_level": "SERIALIZABLE"}, False, False, True),
    "another engine's, AUTOCOMMIT": ({"isolation_level": "AUTOCOMMIT"}, True, True, True),
    "Database's, bound to a connection": ({}, False, False, False),
    "another engine's, bound to a connection": ({}, False, False, False),
}


@asynccontextmanager
async def opened(url: str, kind: str) -> AsyncIterator[tuple[AsyncSession, AsyncSession | AsyncTransaction]]:
    """Yield a session, and what decides: the session, or the transaction of the connection that it is bound to."""
    async with AsyncExitStack() as stack:
        if kind.startswith("Database's"):
            database = await stack.enter_async_context(Database(Settings(database_url=url)))
            engine, make = database.engine, database.session
        else:
            engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), **CONTRACT[kind][0])
            stack.push_async_callback(engine.dispose)
            make = AsyncSession
        if "bound" in kind:  # SQLAlchemy's recipe for tests
            connection = await stack.enter_async_context(engine.connect())
            transaction = await connection.begin()
            session = make(bind=connection, join_transaction_mode="create_savepoint")
            yield await stack.enter_async_context(session), transaction
        else:
            session = await stack.enter_async_context(make(bind=engine))
            yield session, session


@pytest.mark.parametrize("name", ["LogL1", "log_l1"])
@pytest.mark.parametrize("kind", CONTRACT)
async def test_a_record_is_committed_when_the_contract_says_so(
    database_url: str, db: asyncpg.Connection, name: str, kind: str
) -> None:
    async def is_committed(record_id: UUID) -> bool:
        return bool(await db.fetchval("SELECT true FROM mem0_cc.event_log WHERE base_log_id = $1", record_id))

    _, by_dependency, by_function, outside = CONTRACT[kind]
    for inside, end in product((True, False), ("commit", "rollback")):
        expected = outside if not inside else by_dependency if name == "LogL1" else by_function
        async with opened(database_url, kind) as (session, transaction):
            write = await get_log_l1(session) if name == "LogL1" else partial(log_l1, session)
            if inside:
                await session.execute(text("SELECT 1"))
            record_id = await write(EVENT)
            assert await is_committed(record_id) is expected, (inside, end)
            assert session.in_transaction() is inside
            await getattr(transaction, end)()
            assert await is_committed(record_id) is (expected or end == "commit"), (inside, end)


async def test_a_record_joins_a_savepoint(session: AsyncSession, db: asyncpg.Connection) -> None:
    async with session.begin():
        kept = await log_l1(session, EVENT)
        savepoint = await session.begin_nested()
        await log_l1(session, EVENT)
        await savepoint.rollback()
    assert [row["id"] for row in await db.fetch("SELECT id FROM mem0_cc.base_log")] == [kept]


async def test_two_calls_at_once_through_one_session_take_turns(database_url: str, db: asyncpg.Connection) -> None:
    async with opened(database_url, "another engine's") as (session, _):
        write = await get_log_l1(session)
        ids = await asyncio.gather(*(write(EVENT) for _ in range(5)))
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.event_log WHERE base_log_id = ANY($1)", ids) == 5


async def test_logl1_in_a_thread_with_a_loop_of_its_own_is_refused_and_writes_nothing(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    write = await get_log_l1(session)
    await write(EVENT)
    with pytest.raises(DatabaseError, match="^another event loop uses this Database"):
        await asyncio.to_thread(lambda: asyncio.run(write(EVENT)))
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.event_log") == 1
