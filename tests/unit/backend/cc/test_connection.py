import contextlib
import json

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseUnavailableError
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1
from support.database import with_database
from support.refusals import carried_by
from support.sessions import Begin, alone_and_joined
from support.wire import counted

EVENT = EventRecord("tool.called", {})


async def log(url: str, begin: Begin) -> None:
    async with Database(Settings(database_url=url)) as database, database.session() as session, begin(session):
        await log_l1(session, EVENT)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:secret@127.0.0.1:1/d", "(ConnectionRefusedError): nothing answers where DATABASE_URL points"),
        ("postgresql://u:secret@secret.invalid/d", "(gaierror): nothing answers"),
        ("postgresql://u:secret@secret..b/d", "(Unicode"),
        ("postgresql://u:secret@/d?host=127.0.0.1&port=99999", "(OverflowError): nothing answers"),
        ("postgresql:///d?host=/secret", "(FileNotFoundError): a file or a socket that DATABASE_URL names isn't there"),
        ("{by TCP}?sslmode=require", "(ConnectionError): the server refuses such a connection"),
        ("{as it is}&target_session_attrs=standby", "(TargetServerAttributeNotMatched): no server is what"),
        ("{another database}", "(SQLSTATE 3D000): there is no such database"),
    ],
)
@alone_and_joined
async def test_a_database_that_cannot_be_reached_is_an_outage_with_a_hint_and_without_the_address(
    database_url: str, url: str, message: str, begin: Begin
) -> None:
    with counted(database_url) as wire:  # by TCP, because a socket is never asked for TLS
        url = url.replace("{by TCP}", wire.url.partition("?")[0]).replace("{as it is}", database_url)
        url = url.replace("{another database}", with_database(database_url, "secret"))
        with pytest.raises(DatabaseUnavailableError) as raised:
            await log(url, begin)
    assert str(raised.value).startswith(f"the database is unavailable {message}")
    assert raised.value.sqlstate in ("08001", "3D000")
    assert "secret" not in "".join(map(str, carried_by(raised.value)))


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


async def test_a_transaction_that_was_rolled_back_instead_of_committed_is_an_error(
    session: AsyncSession, db: asyncpg.Connection
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK if a statement has failed, and calls it no error."""
    await session.begin()
    await log_l1(session, EVENT)
    with contextlib.suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))
    with pytest.raises(DBAPIError, match="rolled back instead of committed"):
        await session.commit()
    await session.rollback()
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 0
    # The connection is as good as new, and an error that a savepoint has undone is none.
    async with session.begin():
        record_id = await log_l1(session, EVENT)
        with contextlib.suppress(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("SELECT 1 / 0"))
    assert await db.fetchval("SELECT id FROM mem0_cc.base_log") == record_id
