import asyncio
import logging
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Executable, bindparam, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, NoResultFound
from starlette.types import Message
from starlette.websockets import WebSocket

from backend.cc.cc_main import Service, create_app
from backend.cc.config import Settings
from backend.cc.deps import DBSession, LogL1
from backend.cc.exception_handlers import add_exception_handlers
from backend.cc.records import PromptRecord
from backend.cc.services.logging import log_l1 as log_into
from support.clients import TestClient, client_of
from support.database import execute

SECRET = "a prompt nobody may read"
PROMPT = PromptRecord("user", SECRET)
MINE = {"X-Request-ID": "mine"}
NOWHERE = "postgresql://someone:secret@127.0.0.1:1/somewhere"

QUERIES: dict[str, Executable] = {
    "no-row": text("SELECT 1 WHERE false"),
    "taken": text("INSERT INTO parents VALUES (1)"),
    "at-commit": text("INSERT INTO children VALUES (0)"),
    "locked": text("SELECT count(*) FROM mem0_cc.event_log"),
    "died": text("SELECT pg_terminate_backend(pg_backend_pid())"),
    "no-table": text("SELECT 1 FROM nowhere"),
    "wrong-place": text("VACUUM"),
    "no-value": select(bindparam("x", required=True)),
}
TABLES = """
CREATE TABLE parents (id int PRIMARY KEY);
CREATE TABLE children (id int REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
INSERT INTO parents VALUES (1)"""

router = APIRouter()


@router.post("/query/{name}")
async def query(name: str, session: DBSession) -> None:
    result = await session.execute(QUERIES[name])
    if name == "no-row":
        result.one()


@router.post("/log")
async def log(log_l1: LogL1) -> UUID:
    return await log_l1(PROMPT)


@router.post("/log-joined")
async def log_joined(session: DBSession) -> UUID:
    await session.execute(text("SELECT 1"))
    return await log_into(session, PROMPT)


@router.post("/fail")
async def fail() -> None:
    raise RuntimeError(SECRET)


@router.post("/own-timeout")
async def own_timeout(_: DBSession) -> None:
    raise TimeoutError


@router.websocket("/socket/{when}")
async def socket(websocket: WebSocket, log_l1: LogL1, when: str) -> None:
    if when == "early":
        await log_l1(PROMPT)
    await websocket.accept()
    if when == "closed":
        await websocket.close()
    await log_l1(PROMPT)


@pytest.fixture
def app(app: Service) -> Service:
    app.include_router(router)
    return app


@pytest.fixture
def unreachable() -> Service:
    """A service without its database."""
    app = create_app(Settings(database_url=NOWHERE))
    app.include_router(router)
    return app


# Outages are a 503


async def test_a_503_names_the_request_and_the_record_if_there_is_one_and_is_one_warning(
    database_url: str, db: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(database_url=f"{database_url}&options=-c%20lock_timeout%3D100ms"))
    app.include_router(router)
    caplog.clear()
    async with db.transaction(), client_of(app) as client:
        await db.execute("LOCK TABLE mem0_cc.base_log, mem0_cc.event_log")
        response = await client.post("/test-log?token=secret", json={"content": SECRET}, headers=MINE)
        of_a_query = await client.post("/query/locked", headers=MINE)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    answer = response.json()
    assert UUID(answer.pop("record_id")).version == 7
    assert answer == {"detail": "The database is unavailable.", "request_id": "mine"}
    assert (of_a_query.status_code, of_a_query.json()) == (503, answer | {"record_id": None})
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != "asyncio"]
    assert [line.levelname for line in lines] == ["WARNING"] * 2
    unavailable = "503, the database is unavailable (SQLSTATE 55P03): another"
    for line, path in zip(lines, ("/test-log", "/query/{name}"), strict=True):
        assert line.getMessage().startswith(f"POST {path}: {unavailable}")


async def test_a_full_pool_a_slow_query_and_a_connection_that_dies_are_a_503_for_an_endpoints_own_query(
    database_url: str, db: asyncpg.Connection
) -> None:
    app = create_app(Settings(database_url=database_url, cc_db_pool_size=1, cc_db_timeout_seconds=0.3))
    app.include_router(router)
    async with client_of(app) as client:
        assert (await client.post("/query/died")).status_code == 503
        async with app.database.engine.connect():
            assert (await client.post("/query/locked")).status_code == 503
        async with db.transaction():
            await db.execute("LOCK TABLE mem0_cc.event_log")
            assert (await client.post("/query/locked")).status_code == 503
        assert (await client.post("/query/locked")).status_code == 200


async def open_socket(app: FastAPI, when: str) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if when == "gone" and message["type"] == "websocket.close":
            raise OSError

    scope = {"type": "websocket", "path": f"/socket/{when}", "headers": [], "query_string": b""}
    await app({**scope, "extensions": {"websocket.http.response": {}}}, receive, send)
    return sent


@pytest.mark.parametrize(("when", "code"), [("open", 1013), ("closed", 1000), ("gone", 1013)])
async def test_an_outage_closes_a_websocket_and_asks_to_try_again_and_is_no_other_error_if_it_has_ended(
    unreachable: FastAPI, when: str, code: int
) -> None:
    accepted, closed = await open_socket(unreachable, when)
    assert (accepted["type"], closed["type"], closed["code"]) == ("websocket.accept", "websocket.close", code)


async def test_an_outage_is_a_503_to_a_websockets_handshake(
    unreachable: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    answer = (await open_socket(unreachable, "early"))[0]
    assert "WS /socket/{when}: 503, the database is unavailable" in caplog.text
    assert (answer["type"], answer["status"]) == ("websocket.http.response.start", 503)
    assert [name for name, _ in answer["headers"]].count(b"x-request-id") == 1


# Whatever else an endpoint raises is its own: a 500, or what the application's own handlers make of it


async def test_an_unhandled_exception_is_a_json_500_that_names_the_request_and_not_the_exception(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    response = await client.post("/fail", headers=MINE)
    assert response.status_code == 500
    assert response.json() == {"detail": "Internal Server Error", "request_id": "mine"}
    assert response.headers.get_list("x-request-id") == ["mine"]
    [span] = exporter.get_finished_spans()
    [event] = [event for event in span.events if event.name == "exception"]
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "RuntimeError"
    assert "in fail" in str(event.attributes["exception.stacktrace"])
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("path", ["/query/no-table", "/query/wrong-place", "/query/no-value", "/own-timeout"])
async def test_what_would_fail_again_is_a_500(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path)).status_code == 500


@pytest.mark.parametrize(
    ("path", "error", "status"),
    [
        ("/query/no-row", NoResultFound, 404),
        ("/query/taken", IntegrityError, 409),
        ("/query/at-commit", IntegrityError, 409),
        ("/query/died", DBAPIError, 418),  # an outage, for which the service has a handler of a wider class
    ],
)
@pytest.mark.parametrize("handled", [True, False])
def test_a_sqlalchemy_error_reaches_the_applications_own_handler_or_a_test_as_it_is(
    app: Service, database_url: str, path: str, error: type[Exception], *, status: int, handled: bool
) -> None:
    asyncio.run(execute(database_url, TABLES))
    app.exception_handlers.pop(error, None)  # a service may have handlers of its own
    if handled:
        app.add_exception_handler(error, lambda *_: Response(status_code=status))
    with TestClient(app, headers=MINE) as client:
        if handled:
            assert client.post(path).status_code == status
        elif error is not DBAPIError:
            with pytest.raises(error) as raised:
                client.post(path)
            assert raised.value.__notes__ == ["request id: mine"]  # which is what the server's log says of the request


# A mounted application


async def test_a_mounted_application_logs_with_the_ids_of_the_request_and_answers_with_the_services_handlers(
    app: Service, client: httpx.AsyncClient, db: asyncpg.Connection, exporter: InMemorySpanExporter
) -> None:
    sub = FastAPI()
    sub.include_router(router)
    add_exception_handlers(sub)
    app.mount("/sub", sub)
    for path in ("/sub/log", "/sub/log-joined"):
        record_id = (await client.post(path, headers=MINE)).json()
        server = exporter.get_finished_spans()[-1]
        row = await db.fetchrow("SELECT request_id, trace_id FROM mem0_cc.base_log WHERE id = $1", record_id)
        assert tuple(row) == ("mine", format(server.context.trace_id, "032x"))
    outage = await client.post("/sub/query/died", headers=MINE)
    assert (outage.status_code, outage.json()["request_id"]) == (503, "mine")
