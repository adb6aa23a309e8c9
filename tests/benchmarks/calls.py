"""One way of writing, or finding, a record. A process of its own, since Logfire is configured for all of a process.

`python -m benchmarks.calls VARIANT` reads numbers from standard input. For each it makes as many calls, one after the
other, and prints one line of JSON: percentiles of their times, and the CPU time of the process per call.
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
from statistics import quantiles
from typing import Final
from uuid import uuid4

import asyncpg
import logfire
import uvloop
from opentelemetry import trace
from uuid_utils.compat import uuid7

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.mem0_models import BaseLog, EventLog
from backend.cc.records import EventRecord
from backend.cc.services.logging import INSERT_EVENT, log_l1
from benchmarks.floor import keep_as_it_is
from common.logger_logfire import configure_logfire
from common.request_id_middleware import generate_request_id, request_id_var

Call = Callable[[], Awaitable[object]]

PAYLOAD: Final = {"message": "hello", "model": "small", "cached": False}
"""What the event holds."""

SETTINGS: Final = Settings()
URL: Final = SETTINGS.database_url.get_secret_value()


def _insert(executor: asyncpg.Connection | asyncpg.Pool) -> Call:
    async def call() -> None:
        base = (uuid7(), datetime.now(UTC), "cc", str(uuid4()), uuid4().hex)
        await executor.execute(INSERT_EVENT, *base, "test_log", json.dumps(PAYLOAD))

    return call


@contextlib.asynccontextmanager
async def held() -> AsyncIterator[Call]:
    """The floor: the same SQL on one asyncpg connection that is never given back, its values made for each call."""
    yield _insert(await asyncpg.connect(URL))


@contextlib.asynccontextmanager
async def pool() -> AsyncIterator[Call]:
    """The second floor: the same through asyncpg's own pool, which a service without `log_l1` would use."""
    yield _insert(await asyncpg.create_pool(URL))


@contextlib.asynccontextmanager
async def pool_without_reset() -> AsyncIterator[Call]:
    """The same without the statement by which the pool cleans a connection that comes back."""
    yield _insert(await asyncpg.create_pool(URL, reset=keep_as_it_is))


@contextlib.asynccontextmanager
async def log_l1_call() -> AsyncIterator[Call]:
    """`log_l1` as an endpoint that only logs calls it: in a request, which has an id and a span."""
    configure_logfire("cos-cc", **SETTINGS.tracing())
    session = Database(SETTINGS).idle

    async def call() -> None:
        await log_l1(session, EventRecord("test_log", PAYLOAD))

    request_id_var.set(generate_request_id())
    with trace.get_tracer(__name__).start_as_current_span("request"):
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
    connection = await asyncpg.connect(URL)
    count = max(1, await connection.fetchval("SELECT count(*) FROM mem0_cc.base_log"))
    values = itertools.cycle([row[0] for row in await connection.fetch(SAMPLE.replace("COLUMN", column), count)])
    query = FIND.replace("COLUMN", column)

    async def call() -> None:
        await connection.fetch(query, next(values))

    yield call


VARIANTS: Final[dict[str, Callable[[], contextlib.AbstractAsyncContextManager[Call]]]] = {
    "held": held,
    "pool": pool,
    "pool_without_reset": pool_without_reset,
    "log_l1": log_l1_call,
    "orm": orm,
    "request_id": lambda: find("request_id"),
    "trace_id": lambda: find("trace_id"),
}


async def measure(call: Call, count: int) -> dict[str, float]:
    """Make so many calls and return what one took, in milliseconds."""
    walls = []
    cpu = time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        await call()
        walls.append((time.perf_counter() - start) * 1e3)
    # The spans of these calls are still to be sent. No caller waits for that, but the CPU time counts.
    logfire.force_flush()
    percentiles = quantiles(walls, n=100, method="inclusive")
    return {"p50": percentiles[49], "p95": percentiles[94], "cpu": (time.process_time() - cpu) * 1e3 / count}


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
    os._exit(0)  # with its connections open: they have nothing to keep


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
