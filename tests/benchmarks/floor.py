"""The floor that the service is compared with: the same two inserts, and nothing else that the service does."""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
from fastapi import FastAPI
from uuid_utils.compat import uuid7

from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT


async def keep_as_it_is(connection: asyncpg.Connection) -> None:
    """Replace the query by which asyncpg's pool cleans a connection that comes back. The service sends none either."""


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep a pool of connections."""
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=10, max_size=10, reset=keep_as_it_is) as app.state.pool:
        yield


def create_app(span: Callable[..., contextlib.AbstractContextManager[object]]) -> FastAPI:
    """Return an application with one endpoint.

    Args:
        span: Makes the context manager around each insert, from a name and attributes.
    """
    # FastAPI's own tracing is off: it would add spans to those of Logfire's instrumentation.
    app = FastAPI(lifespan=lifespan, telemetry={"tracing": False, "metrics": False, "logs": False})

    @app.post("/test-log")
    async def test_log(body: dict[str, Any]) -> dict[str, str]:
        request_id, trace_id = str(uuid4()), uuid4().hex
        prompt_id, event_id = uuid7(), uuid7()
        base = (datetime.now(UTC), "cc", request_id, trace_id)
        prompt = (body["role"], body["content"], body["tokens_in"], 0)
        event = ("test_log", json.dumps({"message": body["message"]}))
        async with app.state.pool.acquire() as connection:
            with span("insert prompt", request_id=request_id, record_id=str(prompt_id)):
                await connection.execute(INSERT_PROMPT, prompt_id, *base, *prompt)
            with span("insert event", request_id=request_id, record_id=str(event_id)):
                await connection.execute(INSERT_EVENT, event_id, *base, *event)
        return {
            "request_id": request_id,
            "trace_id": trace_id,
            "prompt_trace_id": str(prompt_id),
            "event_log_id": str(event_id),
        }

    return app


_NO_SPAN = contextlib.nullcontext()

app = create_app(lambda *_, **__: _NO_SPAN)
