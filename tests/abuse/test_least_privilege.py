"""The service runs as a role that can add records and nothing else: docs/roles.sql, executed."""

import asyncio
from pathlib import Path

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.services.logging import EventRecord, log_l1
from devtools.service import running_service
from devtools.waiting import until
from support.cluster import locked, waiting
from support.database import run_alembic, with_database

TABLES = ("base_log", "prompt_trace", "event_log")


def test_the_service_runs_as_a_role_that_can_only_insert_and_retry(role_urls: dict[str, str], tmp_path: Path) -> None:
    with running_service(role_urls["cc_runtime"], tmp_path / "service.log") as service:
        for body in ({}, {"content": "hello", "payload": {"k": 1}}):
            answer = httpx.post(f"{service.url}/test-log", json=body)
            assert answer.status_code == 200, service.log

    async def retry() -> None:
        async with Database(Settings(database_url=role_urls["cc_runtime"])) as database, database.session() as session:
            record_id = await log_l1(session, EventRecord("tried", {}))
            assert await log_l1(session, EventRecord("tried", {}), record_id=record_id) == record_id

    asyncio.run(retry())

    async def try_everything_else() -> None:
        connection = await asyncpg.connect(role_urls["cc_runtime"])
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


def test_a_statement_whose_client_has_gone_stops_waiting(postgres_url: str, role_urls: dict[str, str]) -> None:
    url = with_database(postgres_url, str(make_url(role_urls["cc_runtime"]).database))
    with locked(url), asyncio.Runner() as runner:
        client = runner.run(asyncpg.connect(role_urls["cc_runtime"]))
        statement = runner.get_loop().create_task(client.execute("INSERT INTO mem0_cc.base_log DEFAULT VALUES"))
        runner.run(asyncio.sleep(0))  # sends it
        until(lambda: waiting(url) == 1, what="the statement waits for the lock")
        client.terminate()
        runner.run(asyncio.wait([statement]))
        assert isinstance(statement.exception(), asyncpg.ConnectionDoesNotExistError)
        until(lambda: waiting(url) == 0, 5, "its server process has ended")


def test_the_role_for_migrations_can_go_back(role_urls: dict[str, str]) -> None:
    down = run_alembic(role_urls["cc_migrations"], "downgrade", "base")
    assert down.returncode == 0, down.stderr
