"""docs/partitions.sql, executed: what holds of a store that is partitioned by month."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.mem0_models import Base
from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT, EventRecord, PromptRecord, log_l1
from devtools import ROOT
from support.database import execute, run_alembic, with_database

PARTITIONS = (ROOT / "docs/partitions.sql").read_text()
TABLES = {"base_log": "id", "prompt_trace": "base_log_id", "event_log": "base_log_id"}

MAY = datetime(2031, 5, 1, tzinfo=UTC)
JUNE = datetime(2031, 6, 1, tzinfo=UTC)
RANDOM = UUID("9f2b7c4e-3d1a-4e5f-8a6b-1c2d3e4f5a6b")
"""A UUIDv4. Read as a UUIDv7 it would be of the year 7517."""

CONSTRAINTS = """
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'mem0_cc{}'::regnamespace AND contype <> 'n'
"""


@pytest.fixture
async def store(db: asyncpg.Connection) -> asyncpg.Connection:
    """A connection to a store that has been partitioned."""
    await db.execute(PARTITIONS)
    return db


def id_at(moment: datetime, rest: str = "7abc8def0123456789ab") -> UUID:
    """Return a UUIDv7 of a moment."""
    return UUID(f"{round(moment.timestamp() * 1000):012x}{rest}")


def month_of(record_id: UUID) -> str:
    """Return the suffix of the partitions that a UUIDv7 belongs to."""
    return datetime.fromtimestamp((record_id.int >> 80) / 1000, UTC).strftime("%Y_%m")


async def insert(db: asyncpg.Connection, *record_ids: UUID) -> None:
    """Write a prompt for each id and an event for the id after it, with the statements of `log_l1`."""
    for record_id in record_ids:
        event_id = UUID(int=record_id.int + 1)
        await db.execute(INSERT_PROMPT, record_id, datetime.now(UTC), "cc", "r", "t", "user", "hi", 1, 2)
        await db.execute(INSERT_EVENT, event_id, datetime.now(UTC), "cc", "r", "t", "tool.called", "{}")


async def places(db: asyncpg.Connection) -> dict[str, list[tuple[UUID, str]]]:
    """Return where the rows are: of each table, the ids and the suffixes of their partitions."""
    return {
        table: [
            (row[0], row[1].removeprefix(f"mem0_cc_months.{table}_"))
            for row in await db.fetch(f"SELECT {key}, tableoid::regclass::text FROM mem0_cc.{table} ORDER BY 1")
        ]
        for table, key in TABLES.items()
    }


async def rows(db: asyncpg.Connection) -> dict[str, int]:
    return {table: len(found) for table, found in (await places(db)).items()}


async def test_log_l1_writes_both_kinds_into_the_month_of_their_ids(
    store: asyncpg.Connection, session: AsyncSession
) -> None:
    prompt = await log_l1(session, PromptRecord("user", "hi"))
    event = await log_l1(session, EventRecord("tool.called", {}))
    assert await places(store) == {
        "base_log": [(prompt, month_of(prompt)), (event, month_of(event))],
        "prompt_trace": [(prompt, month_of(prompt))],
        "event_log": [(event, month_of(event))],
    }


async def test_alembic_is_content_with_a_store_that_is_partitioned_or_was(
    store: asyncpg.Connection, database_url: str
) -> None:
    for command in (("check",), ("downgrade", "base"), ("upgrade", "head"), ("check",)):
        done = run_alembic(database_url, *command)
        assert done.returncode == 0, done.stderr + done.stdout
    await store.execute(PARTITIONS)
    await insert(store, id_at(datetime.now(UTC)))


async def test_the_models_names_are_kept_with_the_foreign_keys_on_the_partitions(store: asyncpg.Connection) -> None:
    names = {row["conname"] for row in await store.fetch(CONSTRAINTS.format(""))}
    declared = {str(constraint.name) for table in Base.metadata.tables.values() for constraint in table.constraints}
    assert names < declared
    assert declared - names == {"fk_prompt_trace_base_log_id", "fk_event_log_base_log_id"}
    today = datetime.now(UTC)
    months = (f"{today:%Y_%m}", f"{today.replace(day=1) + timedelta(days=31):%Y_%m}", "default")
    found = {tuple(row) for row in await store.fetch(CONSTRAINTS.format("_months")) if row["conname"].startswith("fk")}
    assert found == {
        (
            f"mem0_cc_months.{child}_{month}",
            f"fk_{child}_base_log_id",
            f"FOREIGN KEY (base_log_id) REFERENCES mem0_cc_months.base_log_{month}(id) ON DELETE CASCADE",
        )
        for child in ("prompt_trace", "event_log")
        for month in months
    }


async def test_a_months_partition_takes_that_months_records_and_no_others(store: asyncpg.Connection) -> None:
    await store.execute("SELECT mem0_cc_months.add_month('2031-05-17')")
    millisecond = timedelta(milliseconds=1)
    before, after = id_at(MAY - millisecond), id_at(JUNE)
    lowest, highest = id_at(MAY, "0" * 20), id_at(JUNE - millisecond, "f" * 19 + "e")
    await insert(store, before, lowest, highest, after)
    assert (await places(store))["prompt_trace"] == [
        (before, "default"),
        (lowest, "2031_05"),
        (highest, "2031_05"),
        (after, "default"),
    ]
    assert await rows(store) == {"base_log": 8, "prompt_trace": 4, "event_log": 4}


@pytest.mark.parametrize("record_id", [RANDOM, UUID(int=0), id_at(datetime(1971, 1, 1, tzinfo=UTC)), id_at(MAY)])
async def test_a_record_whose_month_is_missing_is_stored_and_can_be_pruned(
    store: asyncpg.Connection, record_id: UUID
) -> None:
    await insert(store, record_id)
    assert {suffix for found in (await places(store)).values() for _, suffix in found} == {"default"}
    assert await store.execute("DELETE FROM mem0_cc.base_log WHERE id = $1", record_id) == "DELETE 1"
    assert await rows(store) == {"base_log": 1, "prompt_trace": 0, "event_log": 1}


async def test_a_month_that_has_records_in_the_default_partition_is_refused_and_they_stay(
    store: asyncpg.Connection,
) -> None:
    await insert(store, id_at(MAY))
    with pytest.raises(asyncpg.CheckViolationError):
        await store.execute("SELECT mem0_cc_months.add_month('2031-05-17')")
    await store.execute("SELECT mem0_cc_months.add_month('2031-06-17')")
    assert await rows(store) == {"base_log": 2, "prompt_trace": 1, "event_log": 1}


async def test_a_dropped_month_takes_its_records_of_all_tables_leaves_the_others_and_may_be_added_again(
    store: asyncpg.Connection,
) -> None:
    await store.execute("SELECT mem0_cc_months.add_month('2031-05-01'), mem0_cc_months.add_month('2031-06-30')")
    await insert(store, id_at(MAY), id_at(JUNE), RANDOM)
    await store.execute("SELECT mem0_cc_months.add_month('2031-05-31')")
    assert await rows(store) == {"base_log": 6, "prompt_trace": 3, "event_log": 3}
    for _ in range(2):
        await store.execute("SELECT mem0_cc_months.drop_month('2031-05-31')")
        assert await rows(store) == {"base_log": 4, "prompt_trace": 2, "event_log": 2}
    assert {suffix for found in (await places(store)).values() for _, suffix in found} == {"2031_06", "default"}
    await store.execute("SELECT mem0_cc_months.add_month('2031-05-31')")
    await insert(store, id_at(MAY))
    assert (await places(store))["prompt_trace"][0] == (id_at(MAY), "2031_05")


async def test_a_month_gives_up_rather_than_keep_inserts_waiting(store: asyncpg.Connection, database_url: str) -> None:
    reader = await asyncpg.connect(database_url)
    async with reader.transaction():
        await reader.execute("SELECT FROM mem0_cc.base_log")
        for function in ("add_month", "drop_month"):
            with pytest.raises(asyncpg.LockNotAvailableError):
                await store.execute(f"SELECT mem0_cc_months.{function}('2031-05-01')", timeout=10)
    await reader.close()


async def test_a_store_with_records_is_refused_and_keeps_them(db: asyncpg.Connection) -> None:
    await insert(db, id_at(MAY))
    with pytest.raises(asyncpg.RaiseError, match="only an empty store can be partitioned"):
        await db.execute(PARTITIONS)
    await db.execute("ROLLBACK")
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.event_log") == 1


async def test_the_role_that_may_only_insert_still_may(role_urls: dict[str, str], postgres_url: str) -> None:
    migrations = make_url(role_urls["cc_migrations"])
    create = f"CREATE SCHEMA mem0_cc_months AUTHORIZATION {migrations.username}"
    await execute(with_database(postgres_url, str(migrations.database)), create)
    await execute(role_urls["cc_migrations"], PARTITIONS, "SELECT mem0_cc_months.add_month('2031-05-01')")
    runtime = await asyncpg.connect(role_urls["cc_runtime"])
    await insert(runtime, id_at(MAY), id_at(JUNE))
    for statement in (
        "SELECT mem0_cc_months.drop_month('2031-05-01')",
        "SELECT FROM mem0_cc_months.base_log_2031_05",
        "SELECT FROM mem0_cc.base_log",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await runtime.execute(statement)
    await runtime.close()
