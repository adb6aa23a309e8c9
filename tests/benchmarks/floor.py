"""The floor that the service is compared with: the same two inserts, and nothing else that it does."""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
from fastapi import FastAPI
from uuid_utils.compat import uuid7

from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep a pool of connections."""
    # Without the query by which asyncpg's pool cleans a connection that comes back: the service has none either.
    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"], min_size=10, max_size=10, reset=_leave_it
    ) as app.state.pool:
        yield


async def _leave_it(connection: asyncpg.Connection) -> None:
    pass


app = FastAPI(lifespan=lifespan)


@app.post("/test-log")
async def test_log(body: dict[str, Any]) -> dict[str, str]:
    """Write a prompt and an event."""
    request_id, trace_id = str(uuid4()), uuid4().hex
    prompt_id, event_id = uuid7(), uuid7()
    base = (datetime.now(UTC), "cc", request_id, trace_id)
    prompt = (body["role"], body["content"], body["tokens_in"], 0)
    async with app.state.pool.acquire() as connection:
        await connection.execute(INSERT_PROMPT, prompt_id, *base, *prompt)
        await connection.execute(INSERT_EVENT, event_id, *base, "test_log", json.dumps({"message": body["message"]}))
    return {
        "request_id": request_id,
        "trace_id": trace_id,
        "prompt_trace_id": str(prompt_id),
        "event_log_id": str(event_id),
    }
