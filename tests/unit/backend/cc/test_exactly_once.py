import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseUnavailableError
from backend.cc.records import EventRecord, PromptRecord, Record
from backend.cc.services.logging import log_l1
from devtools.waiting import until
from support.cluster import waiting
from support.sessions import Begin, alone_and_joined

PROMPT = PromptRecord("user", "first", tokens_in=1, tokens_out=2)
EVENT = EventRecord("first", {"n": 1})

ROWS = """
    SELECT base.id, base.request_id, prompt.content, event.event_type
    FROM mem0_cc.base_log base
    FULL JOIN mem0_cc.prompt_trace prompt ON prompt.base_log_id = base.id
    FULL JOIN mem0_cc.event_log event ON event.base_log_id = base.id
"""


async def rows(db: asyncpg.Connection) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await db.fetch(ROWS)]


@pytest.mark.parametrize("record_id", [None, UUID(int=7)], ids=["new", "given"])
async def test_the_error_of_an_outage_names_the_id_that_was_tried(record_id: UUID | None) -> None:
    async with Database(Settings(database_url="postgresql://u@127.0.0.1:1/d")) as database:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await log_l1(database.session(), EVENT, record_id=record_id)
    assert raised.value.record_id is not None
    assert raised.value.record_id == record_id or (record_id is None and raised.value.record_id.version == 7)


@alone_and_joined
@pytest.mark.parametrize(
    ("record", "other"),
    [(PROMPT, PromptRecord("assistant", "second")), (EVENT, EventRecord("second", {}))],
    ids=["prompt", "event"],
)
async def test_a_call_with_an_id_writes_what_is_missing_and_changes_nothing_that_is_there(
    session: AsyncSession, db: asyncpg.Connection, begin: Begin, record: Record, other: Record
) -> None:
    record_id = uuid4()
    content, event_type = ("first", None) if record is PROMPT else (None, "first")
    for each, request_id in ((record, "r"), (other, "of the second call"), (record, "of the third call")):
        async with begin(session):
            assert await log_l1(session, each, record_id=record_id, request_id=request_id) == record_id
        assert await rows(db) == [(record_id, "r", content, event_type)]
        if each is other:  # then only the base row is there
            await db.execute("DELETE FROM mem0_cc.prompt_trace; DELETE FROM mem0_cc.event_log")


async def test_a_record_of_the_other_kind_shares_the_base_row_of_the_first_call(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    record_id = await log_l1(session, PROMPT, request_id="r")
    await log_l1(session, EVENT, record_id=record_id, request_id="of the second call")
    assert await rows(db) == [(record_id, "r", "first", "first")]


async def test_a_record_that_was_rolled_back_is_written_by_the_second_call(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    transaction = await session.begin()
    record_id = await log_l1(session, EVENT)
    await transaction.rollback()
    await log_l1(session, EventRecord("second", {}), record_id=record_id, request_id="r")
    assert await rows(db) == [(record_id, "r", None, "second")]


async def test_two_calls_at_once_with_one_id_write_one_record(
    database: Database, database_url: str, db: asyncpg.Connection
) -> None:
    """The second waits for the transaction of the first, which may be one whose connection was lost."""
    record_id = uuid4()
    async with database.session() as first, database.session() as second:
        async with first.begin():
            await log_l1(first, EVENT, record_id=record_id, request_id="r")
            repeated = asyncio.create_task(log_l1(second, EventRecord("second", {}), record_id=record_id))
            await asyncio.to_thread(until, lambda: waiting(database_url) == 1)
        assert await repeated == record_id
    assert await rows(db) == [(record_id, "r", None, "first")]


@pytest.mark.parametrize("wrong", [str(UUID(int=7)), 7, b"\0" * 16, ""])
async def test_an_id_that_is_no_uuid_is_refused_and_writes_nothing(
    session: AsyncSession, db: asyncpg.Connection, wrong: Any
) -> None:
    with pytest.raises(ValueError, match="^record_id must be a UUID$"):
        await log_l1(session, EVENT, record_id=wrong)
    assert await rows(db) == []
