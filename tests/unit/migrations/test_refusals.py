import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import make_url

from support.database import execute, new_database, run_alembic


async def refused(url: str, *command: str) -> str:
    """Run Alembic, which must fail, and return the line that it says."""
    failed = await asyncio.to_thread(run_alembic, url, *command)
    assert failed.returncode != 0
    [line] = (failed.stdout + failed.stderr).strip().splitlines()
    return line.strip()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_is_not_utf8_is_refused_in_a_line(postgres_url: str, encoding: str) -> None:
    async with new_database(postgres_url, f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0") as url:
        line = await refused(url, "upgrade", "head")
    assert line == f"FAILED: the database's encoding must be UTF8: {encoding} can't hold every prompt"


@pytest.mark.parametrize("by", ["URL", "DATABASE", "ROLE"])
async def test_without_a_default_schema_the_migration_is_refused_in_a_line(empty_database_url: str, by: str) -> None:
    url, name = empty_database_url, make_url(empty_database_url).database
    await execute(url, f"CREATE ROLE {name} SUPERUSER LOGIN")
    try:
        if by == "URL":
            url += "&options=-c%20search_path%3D"
        else:
            await execute(url, f"ALTER {by} {name} SET search_path = ''")
        line = await refused(url.replace("postgres@", f"{name}@", 1), "upgrade", "head")
    finally:
        await execute(empty_database_url, f"DROP ROLE {name}")
    assert line.startswith("FAILED: search_path must begin with a schema for Alembic's own table")


async def test_a_table_that_is_there_without_its_migration_is_refused_in_a_line(empty_database_url: str) -> None:
    await execute(empty_database_url, "CREATE SCHEMA mem0_cc", "CREATE TABLE mem0_cc.event_log (id int)")
    line = await refused(empty_database_url, "upgrade", "head")
    assert line.startswith("FAILED: PostgreSQL refused the statement (SQLSTATE 42P07): a table of this name exists")
    connection = await asyncpg.connect(empty_database_url)
    assert await connection.fetchval("SELECT to_regclass('mem0_cc.base_log')") is None
    await connection.close()


async def test_a_table_that_another_transaction_has_locked_is_refused_in_a_line(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE mem0_cc.event_log")
        line = await refused(database_url, "downgrade", "base")
    await connection.close()
    assert "SQLSTATE 55P03): another transaction holds a lock" in line


@pytest.fixture
async def url_of_role_mem0_cc(empty_database_url: str) -> AsyncIterator[str]:
    await execute(empty_database_url, "CREATE ROLE mem0_cc SUPERUSER LOGIN")
    yield empty_database_url.replace("postgres@", "mem0_cc@", 1)
    await execute(empty_database_url, "DROP OWNED BY mem0_cc CASCADE", "DROP ROLE mem0_cc")


async def test_a_role_that_is_named_like_the_schema_is_refused_in_a_line(url_of_role_mem0_cc: str) -> None:
    await execute(url_of_role_mem0_cc, "CREATE SCHEMA mem0_cc")
    line = await refused(url_of_role_mem0_cc, "upgrade", "head")
    assert line.startswith("FAILED: search_path must begin with a schema for Alembic's own table, and not with mem0_cc")
