import asyncio
import subprocess
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

from support.database import alembic_process, execute, run_alembic

TABLES = "SELECT array_agg(tablename::text ORDER BY tablename) FROM pg_tables WHERE schemaname = 'mem0_cc'"
ALL_TABLES = ["base_log", "event_log", "prompt_trace"]


async def fetchval(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def assert_done(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


async def test_up_down_and_up_again_leave_what_they_should(empty_database_url: str) -> None:
    assert_done(alembic_process(empty_database_url, "upgrade", "head"))
    assert await fetchval(empty_database_url, TABLES) == ALL_TABLES
    assert_done(run_alembic(empty_database_url, "downgrade", "base"))
    assert await fetchval(empty_database_url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'mem0_cc'") == 0
    assert_done(run_alembic(empty_database_url, "upgrade", "head"))
    assert await fetchval(empty_database_url, TABLES) == ALL_TABLES


async def test_check_finds_no_drift_beside_other_peoples_schemas(database_url: str) -> None:
    await execute(
        database_url,
        "CREATE SCHEMA theirs",
        "CREATE TABLE theirs.base_log (id int PRIMARY KEY)",
        "CREATE TABLE public.unrelated (id int)",
        "CREATE TABLE public.alembic_version (version_num text PRIMARY KEY)",
        "INSERT INTO public.alembic_version VALUES ('theirs')",
    )
    assert_done(run_alembic(database_url, "check"))
    assert_done(run_alembic(database_url, "upgrade", "head"))


@pytest.mark.parametrize(
    ("drift", "operation"),
    [
        ("ALTER TABLE mem0_cc.base_log ADD COLUMN extra int", "remove_column"),
        ("ALTER TABLE mem0_cc.base_log ALTER COLUMN request_id SET DEFAULT 'x'", "modify_default"),
        ("ALTER TABLE mem0_cc.event_log ALTER COLUMN payload DROP NOT NULL", "modify_nullable"),
        ("DROP INDEX mem0_cc.ix_base_log_trace_id", "add_index"),
        ("CREATE TABLE mem0_cc.extra (id int)", "remove_table"),
    ],
)
async def test_check_finds_drift_of_our_own(database_url: str, drift: str, operation: str) -> None:
    await execute(database_url, drift)
    failed = run_alembic(database_url, "check")
    assert failed.returncode != 0
    assert f"('{operation}'" in failed.stdout + failed.stderr


async def test_several_upgrades_at_once_all_succeed(empty_database_url: str) -> None:
    name = make_url(empty_database_url).database
    await execute(empty_database_url, f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(lambda _: alembic_process(empty_database_url, "upgrade", "head"), range(4)):
            assert_done(result)
    assert await fetchval(empty_database_url, TABLES) == ALL_TABLES


def test_the_sql_can_be_had_without_a_database() -> None:
    result = run_alembic("", "upgrade", "head", "--sql")
    assert_done(result)
    assert "CREATE SCHEMA mem0_cc" in result.stdout
    assert result.stdout.count("CREATE TABLE mem0_cc.") == 3


async def test_the_sql_makes_the_same_schema(empty_database_url: str) -> None:
    await execute(empty_database_url, run_alembic("", "upgrade", "head", "--sql").stdout)
    assert_done(run_alembic(empty_database_url, "check"))


async def test_downgrade_takes_nothing_that_is_not_ours(database_url: str) -> None:
    await execute(database_url, "CREATE TABLE mem0_cc.theirs (id int)")
    assert run_alembic(database_url, "downgrade", "base").returncode != 0
    assert await fetchval(database_url, TABLES) == [*ALL_TABLES, "theirs"]


@pytest.mark.parametrize("password", ["p@ss/w:rd", "100%", "%40", "ü#?&=+ "])
async def test_odd_characters_in_the_password_are_no_problem(database_url: str, password: str) -> None:
    # That it arrives is shown by a server that has nobody of this name: an address read wrongly would be
    # an error of another kind.
    quoted = database_url.replace("postgres@", f"no_such_role:{quote(password, safe='')}@", 1)
    assert make_url(quoted).password == password
    result = await asyncio.to_thread(run_alembic, quoted, "current")
    assert "SQLSTATE 28000" in result.stdout


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:secret@127.0.0.1:1/d", "FAILED: the database is unavailable (SQLSTATE 08001)"),
        ("mysql://u:secret@h/d", "must begin with postgres://"),
        ("", "Field required"),
    ],
)
def test_what_has_to_be_mended_is_said_in_a_line(url: str, said: str) -> None:
    failed = run_alembic(url, "upgrade", "head")
    printed = failed.stdout + failed.stderr
    assert failed.returncode != 0
    assert said in printed
    assert "Traceback" not in printed
    assert "secret" not in printed


async def test_a_role_that_may_not_migrate_is_told_so_in_a_line(database_url: str) -> None:
    role = f"nobody_{uuid4().hex}"
    await execute(database_url, f"CREATE ROLE {role} LOGIN")
    try:
        failed = await asyncio.to_thread(
            run_alembic, database_url.replace("postgres@", f"{role}@", 1), "upgrade", "head"
        )
    finally:
        await execute(database_url, f"DROP ROLE {role}")
    assert failed.returncode != 0
    assert "(SQLSTATE 42501): the role lacks a privilege, see docs/roles.sql" in failed.stdout
    assert "Traceback" not in failed.stderr


async def test_another_error_of_the_databases_is_a_traceback_with_the_statement(empty_database_url: str) -> None:
    await execute(empty_database_url, "CREATE SCHEMA mem0_cc", "CREATE DOMAIN mem0_cc.base_log AS int")
    failed = await asyncio.to_thread(run_alembic, empty_database_url, "upgrade", "head")
    assert failed.returncode != 0
    assert "CREATE TABLE mem0_cc.base_log" in failed.stderr
