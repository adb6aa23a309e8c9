"""A caller that retries with the error's record id ends with exactly one record for each call, whatever breaks."""

import asyncio
import os
import time
from collections import Counter
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.services.logging import DatabaseUnavailableError, EventRecord, PromptRecord, log_l1
from support.cluster import Postgres, fetch, progress

CALLERS = 8

CALLS = int(os.environ.get("CC_SOAK_CALLS", "40000"))
"""How many records are written at least in ./scripts/soak, while PostgreSQL fails again and again."""


@pytest.mark.parametrize("calls", [400, pytest.param(CALLS, marks=pytest.mark.soak)])
async def test_a_caller_that_retries_with_the_same_id_ends_with_exactly_one_record_for_each(
    postgres: Postgres, database_url: str, calls: int
) -> None:
    run = uuid4().hex
    database = Database(Settings(database_url=SecretStr(database_url), cc_db_timeout_seconds=0.5))
    outcomes: Counter[str] = Counter()
    written: list[UUID] = []
    over = asyncio.Event()

    async def write_once(record: PromptRecord | EventRecord, request_id: str) -> UUID:
        record_id = None
        while True:
            try:
                async with database.session() as session:
                    return await log_l1(session, record, request_id=request_id, record_id=record_id)
            except DatabaseUnavailableError as error:
                record_id = error.record_id
                outcomes["retried"] += 1
                await asyncio.sleep(0.02)

    async def call(caller: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            request_id = f"{run}-{caller}-{number}"
            record = PromptRecord("user", request_id) if number % 2 else EventRecord("retried", {"of": request_id})
            written.append(await write_once(record, request_id))

    async def go_on() -> None:
        seen = len(written)
        deadline = time.monotonic() + 20
        while len(written) < seen + max(50, calls // 200):
            assert time.monotonic() < deadline, "no record is written any more"
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        for caller in range(CALLERS):
            tasks.create_task(call(caller))
        while len(written) < calls:
            await go_on()
            await asyncio.to_thread(postgres.kill)
            await asyncio.to_thread(postgres.start)
            await go_on()
            await asyncio.to_thread(postgres.freeze)
            await asyncio.sleep(1)  # twice the time limit, so that calls fail while it is frozen
            await asyncio.to_thread(postgres.thaw)
            await go_on()
            await asyncio.to_thread(postgres.restart)
            progress(f"{len(written)} of {calls} records, {outcomes['retried']} retries")
        await go_on()
        over.set()
    await database.aclose()

    assert outcomes["retried"] > 0
    rows = await asyncio.to_thread(
        fetch,
        database_url,
        f"""SELECT id, request_id, content, payload->>'of' AS event FROM mem0_cc.base_log
        LEFT JOIN mem0_cc.prompt_trace ON prompt_trace.base_log_id = id
        LEFT JOIN mem0_cc.event_log ON event_log.base_log_id = id WHERE request_id LIKE '{run}%'""",
    )
    assert len(written) == len(set(written))
    assert {row["id"] for row in rows} == set(written)
    assert {row["request_id"]: 1 for row in rows} == Counter(row["request_id"] for row in rows)
    assert all({row["content"], row["event"]} == {row["request_id"], None} for row in rows)
