"""When a record is committed, and what a rollback undoes: one row for each kind of session."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.deps import get_log_l1
from backend.cc.records import EventRecord
from backend.cc.services.logging import BoundLogL1, log_l1

EVENT = EventRecord("tool.called", {})


class Transaction(Protocol):
    async def commit(self) -> None: ...
    async def rollback(self) -> None: ...


class Way(NamedTuple):
    """A session, and whose transaction decides."""

    session: AsyncSession
    transaction: Transaction


Open = Callable[[str], AbstractAsyncContextManager[Way]]


@asynccontextmanager
async def of_database(url: str) -> AsyncIterator[Way]:
    async with Database(Settings(database_url=url)) as database, database.session() as session:
        yield Way(session, session)


@asynccontextmanager
async def another_engine(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), **options)
    yield engine
    await engine.dispose()


def of_another(**options: Any) -> Open:
    @asynccontextmanager
    async def of_another_engine(url: str) -> AsyncIterator[Way]:
        async with another_engine(url, **options) as engine, AsyncSession(engine) as session:
            yield Way(session, session)

    return of_another_engine


@asynccontextmanager
async def bound(engine: AsyncEngine, bind: Callable[[AsyncConnection], AsyncSession]) -> AsyncIterator[Way]:
    """SQLAlchemy's recipe for tests: whatever the session commits, the connection's transaction rolls it back."""
    async with engine.connect() as connection:
        transaction = await connection.begin()
        async with bind(connection) as session:
            yield Way(session, transaction)


@asynccontextmanager
async def bound_session(url: str) -> AsyncIterator[Way]:
    async with (
        another_engine(url) as engine,
        bound(engine, partial(AsyncSession, join_transaction_mode="create_savepoint")) as way,
    ):
        yield way


@asynccontextmanager
async def bound_session_of_database(url: str) -> AsyncIterator[Way]:
    async with (
        Database(Settings(database_url=url)) as database,
        bound(database.engine, lambda connection: database.session(bind=connection)) as way,
    ):
        yield way


# How a session is made, and whether a record is committed when the call returns: inside a transaction, and otherwise.
CONTRACT = {
    "Database's": (of_database, False, True),
    "another engine's": (of_another(), False, True),
    "without a pool": (of_another(poolclass=NullPool), False, True),
    "pinged first": (of_another(pool_pre_ping=True), False, True),
    "SERIALIZABLE": (of_another(isolation_level="SERIALIZABLE"), False, True),
    "AUTOCOMMIT": (of_another(isolation_level="AUTOCOMMIT"), True, True),
    "bound": (bound_session, False, False),
    "Database's, bound": (bound_session_of_database, False, False),
}


async def bind(session: AsyncSession) -> BoundLogL1:
    return partial(log_l1, session)


CALLS = [
    pytest.param(call, open_way, {True: inside, False: outside}, id=f"{name}: {kind}")
    for kind, (open_way, inside, outside) in CONTRACT.items()
    for name, call in (("log_l1", bind), ("LogL1", get_log_l1))
    if (name, kind) != ("LogL1", "Database's")
]
CALLS.append(pytest.param(get_log_l1, of_database, {True: True, False: True}, id="LogL1"))


@pytest.mark.parametrize(("call", "open_way", "committed"), CALLS)
async def test_a_record_is_committed_when_the_contract_says_so(
    database_url: str,
    db: asyncpg.Connection,
    call: Callable[[AsyncSession], Awaitable[BoundLogL1]],
    open_way: Open,
    committed: dict[bool, bool],
) -> None:
    async def is_committed(record_id: UUID) -> bool:
        return bool(await db.fetchval("SELECT true FROM mem0_cc.event_log WHERE base_log_id = $1", record_id))

    for inside, end in product((True, False), ("commit", "rollback")):
        async with open_way(database_url) as (session, transaction):
            write = await call(session)
            if inside:
                await session.execute(text("SELECT 1"))
            record_id = await write(EVENT)
            assert await is_committed(record_id) is committed[inside], (inside, end)
            assert session.in_transaction() is inside
            await getattr(transaction, end)()
            assert await is_committed(record_id) is (committed[inside] or end == "commit"), (inside, end)


async def test_a_record_joins_a_savepoint(session: AsyncSession, db: asyncpg.Connection) -> None:
    async with session.begin():
        kept = await log_l1(session, EVENT)
        savepoint = await session.begin_nested()
        await log_l1(session, EVENT)
        await savepoint.rollback()
    assert [row["id"] for row in await db.fetch("SELECT id FROM mem0_cc.base_log")] == [kept]
