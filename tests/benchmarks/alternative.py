"""What a user would write instead for the same trace: the bare endpoint, with Logfire's own instrumentations."""

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

# `OTEL_EXPORTER_OTLP_ENDPOINT` says where the spans go.
logfire.configure(service_name="alternative", send_to_logfire=False, console=False)
logfire.instrument_asyncpg()


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep a pool of connections."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=10, max_size=10) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan, telemetry={"tracing": False, "metrics": False, "logs": False})
logfire.instrument_fastapi(app)


@app.post("/test-log")
async def test_log(body: dict[str, Any]) -> dict[str, str]:
    """Write a prompt and an event, each in a span."""
    request_id, trace_id = str(uuid4()), uuid4().hex
    prompt_id, event_id = uuid7(), uuid7()
    base = (datetime.now(UTC), "cc", request_id, trace_id)
    prompt = (body["role"], body["content"], body["tokens_in"], 0)
    with logfire.span("log prompt", request_id=request_id, record_id=str(prompt_id)):
        await app.state.pool.execute(INSERT_PROMPT, prompt_id, *base, *prompt)
    event = ("test_log", json.dumps({"message": body["message"]}))
    with logfire.span("log event", request_id=request_id, record_id=str(event_id)):
        await app.state.pool.execute(INSERT_EVENT, event_id, *base, *event)
    return {
        "request_id": request_id,
        "trace_id": trace_id,
        "prompt_trace_id": str(prompt_id),
        "event_log_id": str(event_id),
    }
