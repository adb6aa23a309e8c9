"""Concurrent callers, in a process of their own: of one way of writing records, or of a service.

`python -m benchmarks.calls VARIANT` reads lines of `CALLERS SECONDS` from standard input and answers each with JSON.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from itertools import cycle
from statistics import quantiles
from typing import Any, Final
from uuid import uuid4

import asyncpg
import uvloop
from opentelemetry import trace
from opentelemetry.context import Context, attach
from uuid_utils.compat import uuid7

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.records import EventRecord
from backend.cc.services.logging import INSERT_EVENT, log_l1
from benchmarks.floor import keep_as_it_is
from common.logger_logfire import configure_logfire
from common.request_id_middleware import request_id_var
from devtools.ports import HOST

Call = Callable[[], Awaitable[int]]  # returns how many records it has written, or requests sent

URL: Final = os.environ["DATABASE_URL"]
PAYLOAD: Final = {"message": "hello", "model": "small", "cached": False}
BODY: Final = b'{"role":"user","content":"What is the capital of France?","tokens_in":12,"message":"hello"}'


def _request() -> tuple[str, str, Context]:
    """Return the ids of a request, and its trace context."""
    trace_id = uuid4()
    span = trace.NonRecordingSpan(trace.SpanContext(trace_id.int, 1, is_remote=False))
    return str(uuid4()), trace_id.hex, trace.set_span_in_context(span)


REQUESTS: Final = cycle([_request() for _ in range(10_000)])  # made beforehand: an endpoint has them, too


def _base() -> tuple[Any, ...]:
    return uuid7(), datetime.now(UTC), "cc", *next(REQUESTS)[:2]


async def pool() -> Call:
    """The same statement on asyncpg's own pool, with its defaults."""
    connections = await asyncpg.create_pool(URL)

    async def call() -> int:
        await connections.execute(INSERT_EVENT, *_base(), "test_log", json.dumps(PAYLOAD))
        return 1

    return call


async def ours() -> Call:
    """`log_l1`, with nothing to export to."""
    configure_logfire("cos-cc", **Settings().tracing())
    session = Database(Settings()).session()

    async def call() -> int:
        request_id, _, context = next(REQUESTS)
        request_id_var.set(request_id)
        attach(context)
        await log_l1(session, EventRecord("test_log", PAYLOAD))
        return 1

    return call


async def copy() -> Call:
    """The server's speed limit: two COPYs in a transaction of 64 records."""
    connections = await asyncpg.create_pool(URL, reset=keep_as_it_is)

    async def call() -> int:
        base = [_base() for _ in range(64)]
        events = [(row[0], "test_log", json.dumps(PAYLOAD)) for row in base]
        async with connections.acquire() as connection, connection.transaction():
            await connection.copy_records_to_table("base_log", schema_name="mem0_cc", records=base)
            await connection.copy_records_to_table("event_log", schema_name="mem0_cc", records=events)
        return len(base)

    return call


async def post() -> Call:
    """POST /test-log to the service on `PORT`, which must not close connections that are idle between two rounds."""
    head = f"POST /test-log HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}"
    request = head.encode() + b"\r\n\r\n" + BODY
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call() -> int:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(HOST, int(os.environ["PORT"]))
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].split()[0]))
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        idle.append((reader, writer))
        return 1

    return call


async def busy(call: Call, callers: int, seconds: float) -> dict[str, float]:
    """Let each caller call over and over, until the time or its connection ends."""
    walls: list[float] = []
    count = 0
    cpu, start = time.process_time(), time.perf_counter()

    async def caller() -> None:
        nonlocal count
        now = time.perf_counter()
        with contextlib.suppress(EOFError, ConnectionError):
            while now < start + seconds:
                written = await call()
                count += written
                before, now = now, time.perf_counter()
                walls.append((now - before) * 1e3)

    await asyncio.gather(*(caller() for _ in range(callers)))
    cpu, taken = time.process_time() - cpu, time.perf_counter() - start
    p = quantiles(walls, n=100, method="inclusive")
    return {"count": count, "rate": count / taken, "client": cpu, "p50": p[49], "p95": p[94], "p99": p[98]}


async def main(variant: str) -> None:
    ways: dict[str, Callable[[], Awaitable[Call]]] = {"copy": copy, "log_l1": ours, "pool": pool, "post": post}
    call = await ways[variant]()
    await busy(call, 1, 0.2)
    gc.collect()
    gc.freeze()  # as the service does when it starts
    print("ready", flush=True)
    for line in sys.stdin:
        callers, seconds = line.split()
        print(json.dumps(await busy(call, int(callers), float(seconds))), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
