import logging
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from starlette.types import Message, Send
from starlette.websockets import WebSocket

from backend.cc.cc_main import Service, create_app
from backend.cc.config import Settings
from backend.cc.deps import DBSession, LogL1
from backend.cc.errors import DatabaseUnavailableError
from backend.cc.exception_handlers import add_exception_handlers, database_unavailable
from backend.cc.records import EventRecord, PromptRecord

SECRET = "a secret"
MINE = {"X-Request-ID": "mine"}

router = APIRouter()


@router.post("/query")
async def query(session: DBSession) -> None:
    await session.execute(text("SELECT * FROM mem0_cc.event_log"))


@router.post("/fail")
async def fail() -> None:
    raise RuntimeError(SECRET)


@router.post("/log")
async def log(log_l1: LogL1) -> str:
    return str(await log_l1(PromptRecord("user", "hello")))


@router.post("/log-after-a-query")
async def log_after_a_query(session: DBSession, log_l1: LogL1) -> str:
    await session.execute(text("SELECT 1"))
    return str(await log_l1(EventRecord("e", {})))


@pytest.fixture
def app(app: Service) -> Service:
    app.include_router(router)
    return app


@pytest.fixture
async def impatient(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that waits for a lock no longer than 0.1 s."""
    app = create_app(Settings(database_url=f"{database_url}&options=-c%20lock_timeout%3D100ms"))
    app.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc", headers=MINE) as client:
        yield client
    await app.database.aclose()


async def test_where_no_record_is_stored_the_503_names_the_one_that_was_tried(
    impatient: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.base_log")
        response = await impatient.post("/test-log", json={"content": SECRET})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    answer = response.json()
    assert UUID(answer.pop("record_id")).version == 7
    assert answer == {"detail": "The database is unavailable.", "request_id": "mine", "committed": []}


async def test_where_the_event_fails_after_the_prompt_was_committed_the_503_names_both(
    impatient: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.event_log")
        response = await impatient.post("/test-log", json={})
    assert response.status_code == 503
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 1
    prompt_id = str(await db.fetchval("SELECT base_log_id FROM mem0_cc.prompt_trace"))
    answer = response.json()
    assert answer["committed"] == [prompt_id]
    assert UUID(answer["record_id"]).version == 7
    assert answer["record_id"] != prompt_id


async def test_where_an_endpoints_own_query_fails_the_503_names_no_record(
    impatient: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.event_log")
        answer = (await impatient.post("/query")).json()
    assert (answer["request_id"], answer["record_id"], answer["committed"]) == ("mine", None, [])


async def test_a_503_is_one_warning_that_names_the_endpoint_the_cause_and_the_request(
    impatient: httpx.AsyncClient, db: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.base_log")
        await impatient.post("/test-log?token=secret", json={"content": SECRET})
    [line] = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != "asyncio"]
    assert line.levelname == "WARNING"
    assert line.getMessage().startswith("POST /test-log: 503, the database is unavailable (SQLSTATE 55P03): another")
    assert line.request_id == "mine"  # type: ignore[attr-defined]
    assert "secret" not in line.getMessage()


async def test_an_unhandled_exception_is_a_json_500_that_names_the_request_and_not_the_exception(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/fail", headers=MINE)
    assert response.status_code == 500
    assert response.json() == {"detail": "Internal Server Error", "request_id": "mine"}
    assert response.headers.get_list("x-request-id") == ["mine"]


async def test_the_servers_log_gets_the_exception_with_the_request_id_as_its_note(app: Service) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        with pytest.raises(RuntimeError, match=SECRET) as raised:
            await client.post("/fail", headers=MINE)
    assert raised.value.__notes__ == ["request id: mine"]


async def test_the_server_span_has_the_exceptions_type_and_frames_and_not_its_text(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await client.post("/fail")
    [span] = exporter.get_finished_spans()
    [event] = [event for event in span.events if event.name == "exception"]
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "RuntimeError"
    assert "in fail" in str(event.attributes["exception.stacktrace"])
    assert SECRET not in span.to_json()


async def test_a_missing_migration_is_a_500_and_no_outage(client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    await db.execute("DROP SCHEMA mem0_cc CASCADE")
    response = await client.post("/test-log", json={}, headers=MINE)
    assert (response.status_code, response.json()["request_id"]) == (500, "mine")


# A mounted application


@pytest.fixture
def sub(app: Service) -> FastAPI:
    sub = FastAPI()
    sub.include_router(router)
    app.mount("/sub", sub)
    return sub


@pytest.mark.parametrize("path", ["/sub/log", "/sub/log-after-a-query"])
async def test_a_mounted_application_logs_with_the_ids_of_the_request(
    client: httpx.AsyncClient, db: asyncpg.Connection, sub: FastAPI, exporter: InMemorySpanExporter, path: str
) -> None:
    record_id = (await client.post(path, headers=MINE)).json()
    [server] = [span for span in exporter.get_finished_spans() if span.parent is None]
    row = await db.fetchrow("SELECT request_id, trace_id FROM mem0_cc.base_log WHERE id = $1", record_id)
    assert tuple(row) == ("mine", format(server.context.trace_id, "032x"))


async def test_a_mounted_application_answers_503_with_the_services_handlers() -> None:
    app = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/nothing"))
    sub = FastAPI()
    sub.include_router(router)
    add_exception_handlers(sub)
    app.mount("/sub", sub)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        response = await client.post("/sub/log", headers=MINE)
    assert (response.status_code, response.json()["request_id"]) == (503, "mine")


# A WebSocket that has ended before its error is answered


def open_websocket(send: Send) -> WebSocket:
    async def receive() -> Message:
        return {"type": "websocket.connect"}

    return WebSocket({"type": "websocket", "state": {"request_id": "mine"}}, receive, send)


async def test_an_outage_after_the_end_of_a_websocket_is_no_other_error(caplog: pytest.LogCaptureFixture) -> None:
    async def gone(message: Message) -> None:
        if message["type"] == "websocket.close":
            raise OSError

    async def taken(message: Message) -> None:
        pass

    for send, close_first in ((gone, False), (taken, True)):
        websocket = open_websocket(send)
        await websocket.accept()
        if close_first:
            await websocket.close()
        assert await database_unavailable(websocket, DatabaseUnavailableError("no more")) is None
    assert caplog.messages == ["WS : 503, no more"] * 2
