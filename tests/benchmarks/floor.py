"""The floor that the service is compared with: the same two inserts, and nothing else that the service does.

With an OTLP endpoint it is traced by Logfire's instrumentations: what you'd pick instead of cos-cc.
"""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import logfire
from fastapi import FastAPI
from uuid_utils.compat import uuid7

from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT

TRACED = "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ


async def keep_as_it_is(connection: asyncpg.Connection) -> None:
    """Replace the query by which asyncpg's pool resets a connection that comes back."""


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=10, max_size=10, reset=keep_as_it_is) as app.state.pool:
        yield


# FastAPI's own tracing is off: it would add spans to those of Logfire's instrumentation.
app = FastAPI(lifespan=lifespan, telemetry={"tracing": False, "metrics": False, "logs": False})
no_span = contextlib.nullcontext()
if TRACED:
    logfire.configure(send_to_logfire=False, console=False)
    logfire.instrument_asyncpg()
    logfire.instrument_fastapi(app)


@app.post("/test-log")
async def test_log(body: dict[str, Any]) -> dict[str, str]:
    request_id, trace_id = str(uuid4()), uuid4().hex
    prompt_id, event_id = uuid7(), uuid7()
    base = (datetime.now(UTC), "cc", request_id, trace_id)
    prompt = (body["role"], body["content"], body["tokens_in"], 0)
    event = ("test_log", json.dumps({"message": body["message"]}))
    async with app.state.pool.acquire() as connection:
        with logfire.span("insert prompt", request_id=request_id, record_id=str(prompt_id)) if TRACED else no_span:
            await connection.execute(INSERT_PROMPT, prompt_id, *base, *prompt)
        with logfire.span("insert event", request_id=request_id, record_id=str(event_id)) if TRACED else no_span:
            await connection.execute(INSERT_EVENT, event_id, *base, *event)
    ids = {"prompt_trace_id": str(prompt_id), "event_log_id": str(event_id)}
    return {"request_id": request_id, "trace_id": trace_id} | ids
