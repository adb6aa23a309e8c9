"""What an operator can put right is said in a line, without a traceback and without the URL."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy import make_url

from support.database import execute, new_database, run_alembic


async def refused(url: str, *command: str) -> list[str]:
    """Run Alembic, which must fail, and return the lines that it prints."""
    failed = await asyncio.to_thread(run_alembic, url, *(command or ("upgrade", "head")))
    assert failed.returncode != 0
    said = failed.stdout + failed.stderr
    assert "Traceback" not in said
    assert "secret" not in said
    return said.strip().splitlines()


@asynccontextmanager
async def role(url: str, name: str, options: str) -> AsyncIterator[str]:
    """Create a role that may log in, and drop it at the end. Yields the URL for it."""
    await execute(url, f"CREATE ROLE {name} LOGIN {options}")
    try:
        yield url.replace("postgres@", f"{name}@", 1)
    finally:
        await execute(url, f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:secret@127.0.0.1:1/d", "FAILED: the database is unavailable (ConnectionRefusedError)"),
        ("mysql://u:secret@h/d", "must begin with postgres://"),
        ("", "Field required"),
    ],
)
async def test_a_url_that_leads_to_no_database_is_refused(url: str, said: str) -> None:
    assert said in "\n".join(await refused(url))


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_is_not_utf8_is_refused_in_a_line(postgres_url: str, encoding: str) -> None:
    async with new_database(postgres_url, f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0") as url:
        [line] = await refused(url)
    assert line == f"FAILED: the database's encoding must be UTF8: {encoding} can't hold every prompt"


@pytest.mark.parametrize("by", ["URL", "DATABASE", "ROLE"])
async def test_without_a_default_schema_the_migration_is_refused_in_a_line(empty_database_url: str, by: str) -> None:
    name = str(make_url(empty_database_url).database)
    async with role(empty_database_url, name, "SUPERUSER") as url:
        if by != "URL":
            await execute(url, f"ALTER {by} {name} SET search_path = ''")
        [line] = await refused(url + "&options=-c%20search_path%3D" * (by == "URL"))
    assert line.startswith("FAILED: search_path must begin with a schema for Alembic's own table")


async def test_a_role_that_is_named_like_the_schema_is_refused_in_a_line(empty_database_url: str) -> None:
    async with role(empty_database_url, "mem0_cc", "SUPERUSER") as url:
        await execute(url, "CREATE SCHEMA mem0_cc")
        [line] = await refused(url)
    assert line.startswith("FAILED: search_path must begin with a schema for Alembic's own table, and not with mem0_cc")


async def test_a_role_that_may_not_migrate_is_told_so_in_a_line(database_url: str) -> None:
    async with role(database_url, f"nobody_{make_url(database_url).database}", "") as url:
        [line] = await refused(url)
    assert "(SQLSTATE 42501): the role lacks a privilege, see docs/roles.sql" in line


async def test_a_table_that_is_there_without_its_migration_is_refused_in_a_line(empty_database_url: str) -> None:
    await execute(empty_database_url, "CREATE SCHEMA mem0_cc", "CREATE TABLE mem0_cc.event_log (id int)")
    [line] = await refused(empty_database_url)
    assert line.startswith("FAILED: PostgreSQL refused the statement (SQLSTATE 42P07): a table of this name exists")
    connection = await asyncpg.connect(empty_database_url)
    assert await connection.fetchval("SELECT to_regclass('mem0_cc.base_log')") is None
    await connection.close()


async def test_a_table_that_another_transaction_has_locked_is_refused_in_a_line(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE mem0_cc.event_log")
        [line] = await refused(database_url, "downgrade", "base")
    await connection.close()
    assert "SQLSTATE 55P03): another transaction holds a lock" in line
