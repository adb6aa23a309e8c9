"""The service runs as a role that can add records and nothing else: docs/roles.sql, executed."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url

from devtools import ROOT
from devtools.service import running_service
from devtools.waiting import until
from support.cluster import locked, waiting
from support.database import execute, run_alembic, with_database

ROLES = ("cc_runtime", "cc_migrations")
TABLES = ("base_log", "prompt_trace", "event_log")


@pytest.fixture
def urls(postgres_url: str) -> Iterator[dict[str, str]]:
    """A database in which roles.sql and then the migrations were run: its URL for either role.

    The roles have names of the test's own: on a server with other databases they may exist.
    """
    own = uuid4().hex
    sql = (ROOT / "docs/roles.sql").read_text()
    for role in ROLES:
        sql = sql.replace(role, f"{role}_{own}")
    url = with_database(postgres_url, f"test_{own}")
    by_role = {
        role: make_url(url).set(username=f"{role}_{own}").render_as_string(hide_password=False) for role in ROLES
    }
    asyncio.run(execute(postgres_url, f"CREATE DATABASE test_{own}"))
    try:
        asyncio.run(execute(url, sql))
        # A password where the server asks for one: the same as the tests' own.
        if password := make_url(postgres_url).password:
            asyncio.run(execute(url, *(f"ALTER ROLE {role}_{own} PASSWORD '{password}'" for role in ROLES)))
        migrated = run_alembic(by_role["cc_migrations"], "upgrade", "head")
        assert migrated.returncode == 0, migrated.stderr
        yield by_role
    finally:
        roles = [f"DROP ROLE IF EXISTS {role}_{own}" for role in ROLES]
        asyncio.run(execute(postgres_url, f"DROP DATABASE test_{own} WITH (FORCE)", *roles))


def test_the_service_runs_as_a_role_that_can_only_insert(urls: dict[str, str], tmp_path: Path) -> None:
    with running_service(urls["cc_runtime"], tmp_path / "service.log") as service:
        for body in ({}, {"content": "hello", "payload": {"k": 1}}):
            answer = httpx.post(f"{service.url}/test-log", json=body)
            assert answer.status_code == 200, service.log

    async def try_everything_else() -> None:
        connection = await asyncpg.connect(urls["cc_runtime"])
        try:
            for table in TABLES:
                for statement in (
                    f"SELECT FROM mem0_cc.{table}",
                    f"SELECT count(*) FROM mem0_cc.{table}",
                    f"DELETE FROM mem0_cc.{table}",
                    f"TRUNCATE mem0_cc.{table} CASCADE",
                    f"DROP TABLE mem0_cc.{table} CASCADE",
                    f"ALTER TABLE mem0_cc.{table} ADD COLUMN more text",
                    f"CREATE INDEX ON mem0_cc.{table} ((1))",
                ):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.execute(statement)
            for statement in (
                "UPDATE mem0_cc.base_log SET request_id = ''",
                "UPDATE mem0_cc.prompt_trace SET content = ''",
                "UPDATE mem0_cc.event_log SET payload = '{}'",
                "CREATE TABLE mem0_cc.more ()",
                "CREATE TABLE public.more ()",
                "DROP SCHEMA mem0_cc CASCADE",
                "SELECT * FROM public.alembic_version_cos_cc",
                "CREATE ROLE more",
                "CREATE DATABASE more",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(try_everything_else())


INSERT = """
import asyncio, asyncpg, sys
async def insert():
    connection = await asyncpg.connect(sys.argv[1])
    await connection.execute("INSERT INTO mem0_cc.base_log DEFAULT VALUES")
asyncio.run(insert())
"""


def test_a_statement_whose_client_has_gone_stops_waiting(postgres_url: str, urls: dict[str, str]) -> None:
    url = with_database(postgres_url, str(make_url(urls["cc_runtime"]).database))
    with locked(url):
        client = subprocess.Popen([sys.executable, "-c", INSERT, urls["cc_runtime"]])
        until(lambda: waiting(url) == 1, what="the statement waits for the lock")
        client.kill()
        client.wait()
        until(lambda: waiting(url) == 0, 5, "its server process has ended")


def test_the_role_for_migrations_can_go_back(urls: dict[str, str]) -> None:
    down = run_alembic(urls["cc_migrations"], "downgrade", "base")
    assert down.returncode == 0, down.stderr
