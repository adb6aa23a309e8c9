"""One way of writing, or finding, a record. A process of its own, since Logfire is configured for all of a process.

`python calls.py VARIANT` reads numbers from standard input; for each it makes as many calls, one after the
other, and prints one line of JSON: how long each call took and the CPU time of the process per call.
"""

import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

import asyncpg
import logfire
import uvloop
from uuid_utils.compat import uuid7

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.mem0_models import BaseLog, EventLog
from backend.cc.records import EventRecord
from backend.cc.services.logging import INSERT_EVENT, log_l1
from common.logger_logfire import configure_logfire

Call = Callable[[], Awaitable[object]]

PAYLOAD: Final = {"message": "hello", "model": "small", "cached": False}
"""What the event holds."""

SETTINGS: Final = Settings()


@contextlib.asynccontextmanager
async def raw() -> AsyncIterator[Call]:
    """The floor: the same SQL on one asyncpg connection that is never given back, its values made for each call."""
    connection = await asyncpg.connect(SETTINGS.database_url.get_secret_value())

    async def call() -> None:
        base = (uuid7(), datetime.now(UTC), "cc", str(uuid4()), uuid4().hex)
        await connection.execute(INSERT_EVENT, *base, "test_log", json.dumps(PAYLOAD))

    yield call


@contextlib.asynccontextmanager
async def pool() -> AsyncIterator[Call]:
    """The second floor: the same SQL through asyncpg's own pool, as a user would write it without `log_l1`."""
    connections = await asyncpg.create_pool(SETTINGS.database_url.get_secret_value())

    async def call() -> None:
        base = (uuid7(), datetime.now(UTC), "cc", str(uuid4()), uuid4().hex)
        await connections.execute(INSERT_EVENT, *base, "test_log", json.dumps(PAYLOAD))

    yield call


@contextlib.asynccontextmanager
async def log_l1_call() -> AsyncIterator[Call]:
    """`log_l1` on one session. Outside a transaction it takes a connection of its own for each call."""
    configure_logfire("cos-cc", otlp=SETTINGS.otel_exporter_otlp_endpoint is not None)
    session = Database(SETTINGS).session()

    async def call() -> None:
        await log_l1(session, EventRecord("test_log", PAYLOAD))

    yield call


@contextlib.asynccontextmanager
async def orm() -> AsyncIterator[Call]:
    """What one would write first: SQLAlchemy's unit of work."""
    database = Database(SETTINGS)

    async def call() -> None:
        async with database.session() as session:
            base = BaseLog(
                id=uuid7(),
                timestamp=datetime.now(UTC),
                source_module="cc",
                request_id=str(uuid4()),
                trace_id=uuid4().hex,
            )
            session.add(base)
            await session.flush()
            session.add(EventLog(base_log_id=base.id, event_type="test_log", payload=PAYLOAD))
            await session.commit()

    yield call


SAMPLE: Final = """
    SELECT COLUMN FROM mem0_cc.base_log TABLESAMPLE BERNOULLI (least(100, 5e6 / $1)) ORDER BY random() LIMIT 20000
"""

FIND: Final = """
    SELECT * FROM mem0_cc.base_log AS base
    LEFT JOIN mem0_cc.prompt_trace AS prompt ON prompt.base_log_id = base.id
    LEFT JOIN mem0_cc.event_log AS event ON event.base_log_id = base.id
    WHERE base.COLUMN = $1
"""


@contextlib.asynccontextmanager
async def find(column: str) -> AsyncIterator[Call]:
    """Look up the records of a request or a trace, each time another one."""
    connection = await asyncpg.connect(SETTINGS.database_url.get_secret_value())
    count = max(1, await connection.fetchval("SELECT count(*) FROM mem0_cc.base_log"))
    values = itertools.cycle([row[0] for row in await connection.fetch(SAMPLE.replace("COLUMN", column), count)])
    query = FIND.replace("COLUMN", column)

    async def call() -> None:
        await connection.fetch(query, next(values))

    yield call


VARIANTS: Final[dict[str, Callable[[], contextlib.AbstractAsyncContextManager[Call]]]] = {
    "raw": raw,
    "pool": pool,
    "log_l1": log_l1_call,
    "orm": orm,
    "request_id": lambda: find("request_id"),
    "trace_id": lambda: find("trace_id"),
}


async def measure(call: Call, count: int) -> dict[str, object]:
    """Make so many calls and say what they took, in milliseconds."""
    walls = []
    cpu = time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        await call()
        walls.append((time.perf_counter() - start) * 1e3)
    # The spans of these calls are still to be sent: nobody waits for that, but the CPU time is theirs.
    logfire.force_flush()
    return {"milliseconds": walls, "cpu": (time.process_time() - cpu) * 1e3 / count}


async def main(variant: str) -> None:
    """Serve standard input."""
    async with VARIANTS[variant]() as call:
        await measure(call, 300)
        # As the service does at its start.
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(await measure(call, int(line))), flush=True)
    os._exit(0)  # with its connections open: there is nothing to be kept


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
