import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Executable, bindparam, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.types import Message
from starlette.websockets import WebSocket

from backend.cc.cc_main import Service, create_app
from backend.cc.config import Settings
from backend.cc.deps import DBSession, LogL1
from backend.cc.errors import DatabaseError, DatabaseUnavailableError
from backend.cc.exception_handlers import add_exception_handlers, database_unavailable
from backend.cc.records import PromptRecord
from backend.cc.services.logging import log_l1 as log_into
from support.clients import TestClient, client_of
from support.database import execute
from support.refusals import REFUSALS, carried_by

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
    "deallocating": text("DEALLOCATE ALL"),
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


@router.post("/log-elsewhere")
async def log_elsewhere(request: Request) -> UUID:
    async with AsyncSession(request.app.state.another_engine) as session:
        return await log_into(session, PROMPT)


@router.post("/fail")
async def fail() -> None:
    raise RuntimeError(SECRET)


@router.post("/own-timeout")
async def own_timeout(_: DBSession) -> None:
    raise TimeoutError


@router.websocket("/socket")
async def socket(websocket: WebSocket, log_l1: LogL1, *, early: bool = False) -> None:
    if early:
        await log_l1(PROMPT)
    await websocket.accept()
    await log_l1(PROMPT)


@pytest.fixture
def app(app: Service) -> Service:
    app.include_router(router)
    return app


@pytest.fixture
async def impatient(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that waits for a lock no longer than 0.1 s."""
    app = create_app(Settings(database_url=f"{database_url}&options=-c%20lock_timeout%3D100ms"))
    app.include_router(router)
    async with client_of(app) as client:
        yield client


@pytest.fixture
def unreachable() -> Service:
    """A service without its database."""
    app = create_app(Settings(database_url=NOWHERE))
    app.include_router(router)
    return app


# Outages are a 503


async def test_a_503_names_the_request_and_the_record_and_is_one_warning(
    impatient: httpx.AsyncClient, db: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.base_log")
        response = await impatient.post("/test-log?token=secret", json={"content": SECRET}, headers=MINE)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    answer = response.json()
    assert UUID(answer.pop("record_id")).version == 7
    assert answer == {"detail": "The database is unavailable.", "request_id": "mine"}
    [line] = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != "asyncio"]
    assert line.levelname == "WARNING"
    assert line.getMessage().startswith("POST /test-log: 503, the database is unavailable (SQLSTATE 55P03): another")


async def test_if_an_endpoints_own_query_fails_the_503_names_no_record(
    impatient: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    async with db.transaction():
        await db.execute("LOCK TABLE mem0_cc.event_log")
        response = await impatient.post("/query/locked", headers=MINE)
    assert (response.status_code, response.json()["request_id"], response.json()["record_id"]) == (503, "mine", None)


@pytest.mark.parametrize("path", ["/log", "/log-joined", "/query/locked"])
async def test_an_unreachable_database_is_a_503_that_says_nothing_of_it(
    unreachable: Service, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(unreachable) as client:
        response = await client.post(path)
    assert response.status_code == 503
    assert "nothing answers where DATABASE_URL points" in caplog.messages[-1]
    assert "secret" not in response.text + caplog.text


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


async def test_statements_that_somebody_has_dropped_are_one_503_and_prepared_anew(client: httpx.AsyncClient) -> None:
    paths = ["/log-joined", "/query/deallocating", "/log-joined", "/log-joined"]
    assert [(await client.post(path)).status_code for path in paths] == [200, 200, 503, 200]


async def open_socket(app: FastAPI, query: bytes = b"") -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    extensions: dict[str, object] = {"websocket.http.response": {}}
    scope = {"type": "websocket", "path": "/socket", "headers": [], "query_string": query, "extensions": extensions}
    await app(scope, receive, send)
    return sent


async def test_an_outage_closes_a_websocket_and_asks_to_try_again(unreachable: FastAPI) -> None:
    accepted, closed = await open_socket(unreachable)
    assert (accepted["type"], closed["type"], closed["code"]) == ("websocket.accept", "websocket.close", 1013)


async def test_an_outage_is_a_503_to_a_websockets_handshake(
    unreachable: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    answer = (await open_socket(unreachable, b"early=true"))[0]
    assert "WS /socket: 503, the database is unavailable" in caplog.text
    assert (answer["type"], answer["status"]) == ("websocket.http.response.start", 503)
    assert [name for name, _ in answer["headers"]].count(b"x-request-id") == 1


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "gone"])
async def test_an_outage_after_the_end_of_a_websocket_is_no_other_error(
    caplog: pytest.LogCaptureFixture, *, is_closed: bool
) -> None:
    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        if message["type"] == "websocket.close" and not is_closed:
            raise OSError

    websocket = WebSocket({"type": "websocket", "state": {"request_id": "mine"}}, receive, send)
    await websocket.accept()
    if is_closed:
        await websocket.close()
    assert await database_unavailable(websocket, DatabaseUnavailableError("no more")) is None
    assert caplog.messages == ["WS : 503, no more"]


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
    if handled:
        app.add_exception_handler(error, lambda *_: Response(status_code=status))
    with TestClient(app, headers=MINE) as client:
        if handled:
            assert client.post(path).status_code == status
        elif error is not DBAPIError:
            with pytest.raises(error) as raised:
                client.post(path)
            assert raised.value.__notes__ == ["request id: mine"]  # which is what the server's log says of the request


@pytest.mark.parametrize("path", ["/log", "/log-joined", "/log-elsewhere"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_prompt_that_postgresql_refuses_is_in_nothing_that_a_middleware_raises_and_in_no_log(
    app: Service, database_url: str, caplog: pytest.LogCaptureFixture, path: str, refusal: str
) -> None:
    """Starlette raises an endpoint's `__cause__ or __context__` if there is such a middleware."""

    @app.middleware("http")
    async def through(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    await execute(database_url, REFUSALS[refusal])
    app.state.another_engine = create_async_engine(make_url(database_url).set(drivername="postgresql+asyncpg"))
    with caplog.at_level(logging.DEBUG):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
            with pytest.raises(DatabaseError) as raised:
                await client.post(path)
    await app.state.another_engine.dispose()
    carried = carried_by(raised.value)
    assert {type(error) for error in carried} == {DatabaseError, ExceptionGroup}  # the group is Starlette's
    assert SECRET not in "".join(map(str, carried)) + caplog.text


# A mounted application


@pytest.mark.parametrize("path", ["/sub/log", "/sub/log-joined"])
async def test_a_mounted_application_logs_with_the_ids_of_the_request(
    app: Service, client: httpx.AsyncClient, db: asyncpg.Connection, exporter: InMemorySpanExporter, path: str
) -> None:
    sub = FastAPI()
    sub.include_router(router)
    app.mount("/sub", sub)
    record_id = (await client.post(path, headers=MINE)).json()
    [server] = [span for span in exporter.get_finished_spans() if span.parent is None]
    row = await db.fetchrow("SELECT request_id, trace_id FROM mem0_cc.base_log WHERE id = $1", record_id)
    assert tuple(row) == ("mine", format(server.context.trace_id, "032x"))


async def test_a_mounted_application_answers_503_with_the_services_handlers(unreachable: Service) -> None:
    sub = FastAPI()
    sub.include_router(router)
    add_exception_handlers(sub)
    unreachable.mount("/sub", sub)
    async with client_of(unreachable) as client:
        response = await client.post("/sub/log", headers=MINE)
    assert (response.status_code, response.json()["request_id"]) == (503, "mine")
