import asyncio
import contextlib
from collections.abc import AsyncIterator
from uuid import UUID

import anyio
import asyncpg
import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import Executable, bindparam, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import Message

from backend.cc.cc_main import Service, create_app
from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.deps import DBSession, LogL1, get_db_session
from backend.cc.errors import DatabaseUnavailableError
from backend.cc.records import EventRecord, PromptRecord

EVENT = EventRecord("tool.called", {})


router = APIRouter()

REFUSED: list[Executable] = [text("SELECT :x"), select(bindparam("x", required=True))]


@router.post("/records")
async def records(log_l1: LogL1) -> str:
    return str(await log_l1(PromptRecord("user", "hello")))


@router.post("/after-a-query")
async def after_a_query(session: DBSession, log_l1: LogL1) -> str:
    await session.execute(text("SELECT 1"))
    return str(await log_l1(EVENT))


@router.post("/after-an-error")
async def after_an_error(session: DBSession, log_l1: LogL1) -> None:
    await session.execute(text("SELECT 1"))
    await log_l1(EVENT)
    raise HTTPException(418)


@router.post("/ignoring-an-error")
async def ignoring_an_error(session: DBSession, log_l1: LogL1) -> None:
    await session.execute(text("SELECT 1"))
    await log_l1(EVENT)
    with contextlib.suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))


@router.post("/failing-commit")
async def failing_commit(session: DBSession) -> str:
    await session.execute(text("INSERT INTO checked_at_commit VALUES (0)"))
    return "done"


@router.post("/failing-query")
async def failing_query(session: DBSession) -> None:
    await session.execute(text("SELECT * FROM nowhere WHERE x = :x"), {"x": "secret"})


@router.post("/failing-query/{number}")
async def failing_in_sqlalchemy(number: int, session: DBSession) -> None:
    await session.execute(REFUSED[number])


async def kill(session: AsyncSession) -> None:
    """Begin a transaction, and end its connection."""
    pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    async with session.bind.connect() as other:  # type: ignore[union-attr]
        await other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})


@router.post("/killed")
async def killed(session: DBSession) -> None:
    await kill(session)
    raise HTTPException(404)


@router.post("/killed-and-caught")
async def killed_and_caught(session: DBSession, log_l1: LogL1) -> None:
    await kill(session)
    with contextlib.suppress(DatabaseUnavailableError):
        await log_l1(EVENT)


@router.post("/deallocating")
async def deallocating(session: DBSession, log_l1: LogL1) -> None:
    await session.execute(text("SELECT 1"))
    await log_l1(EVENT)
    await session.execute(text("DEALLOCATE ALL"))


@router.post("/vacuum")
async def vacuum(session: DBSession) -> None:
    await session.execute(text("VACUUM"))


@router.post("/streamed")
async def streamed(session: DBSession, log_l1: LogL1, *, begin: bool) -> StreamingResponse:
    if begin:
        await session.execute(text("SELECT 1"))

    async def stream() -> AsyncIterator[str]:
        try:
            await session.execute(text("SELECT 1"))
        except InvalidRequestError:
            yield "closed "
        yield str(await log_l1(EVENT))

    return StreamingResponse(stream())


@router.websocket("/socket")
async def socket(websocket: WebSocket, log_l1: LogL1) -> None:
    await websocket.accept()
    await websocket.send_text(str(await log_l1(EVENT)))
    await websocket.close()


@router.websocket("/early-socket")
async def early_socket(websocket: WebSocket, log_l1: LogL1) -> None:
    await log_l1(EVENT)
    await websocket.accept()


@router.post("/own-ids")
async def own_ids(log_l1: LogL1) -> UUID:
    return await log_l1(EVENT, request_id="own", record_id=UUID(int=7))


@router.post("/own-timeout")
async def own_timeout(_: DBSession) -> None:
    raise TimeoutError


@pytest.fixture
def app(settings: Settings) -> Service:
    app = create_app(settings)
    app.include_router(router)
    return app


async def test_a_record_is_committed_when_the_answer_arrives(client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    record_id = (await client.post("/records")).json()
    assert await db.fetchval("SELECT true FROM mem0_cc.prompt_trace WHERE base_log_id = $1", record_id)


async def test_an_endpoint_may_give_its_own_ids(client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    assert UUID((await client.post("/own-ids")).json()) == UUID(int=7)
    assert await db.fetchval("SELECT request_id FROM mem0_cc.base_log WHERE id = $1", UUID(int=7)) == "own"


async def test_a_record_that_joined_an_earlier_query_is_committed_too(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    record_id = (await client.post("/after-a-query")).json()
    assert await db.fetchval("SELECT true FROM mem0_cc.event_log WHERE base_log_id = $1", record_id)


async def test_an_error_rolls_back_what_is_open(client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    assert (await client.post("/after-an-error")).status_code == 418
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 0
    assert await db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == 0


async def test_a_request_that_is_cancelled_again_and_again_gives_a_connection_back_that_works(app: Service) -> None:
    """As anyio cancels, at every `await` on the way out."""
    request = Request({"type": "http", "state": {"database": app.database}})
    pids = []

    async def serve(scope: anyio.CancelScope) -> None:
        async with contextlib.asynccontextmanager(get_db_session)(request) as session:
            pids.append((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
            scope.cancel()
            await asyncio.Event().wait()

    for _ in range(3):
        with anyio.CancelScope() as scope:
            await serve(scope)
        async with asyncio.timeout(5):  # for the rollback, which nobody waits for any more
            while app.database._engine.pool.checkedout():  # type: ignore[attr-defined]  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
    assert len(set(pids)) == 1


async def test_a_commit_that_fails_is_never_a_2xx(client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    await db.execute(
        "CREATE TABLE parents (id int PRIMARY KEY);"
        "CREATE TABLE checked_at_commit (id int REFERENCES parents DEFERRABLE INITIALLY DEFERRED)"
    )
    assert (await client.post("/failing-commit")).status_code == 500
    assert await db.fetchval("SELECT count(*) FROM checked_at_commit") == 0


async def test_a_transaction_that_went_on_after_an_error_is_never_a_2xx(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    assert (await client.post("/ignoring-an-error")).status_code == 500
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 0
    assert (await client.post("/after-a-query")).status_code == 200


async def test_a_query_that_fails_is_a_500_that_says_nothing_of_it(client: httpx.AsyncClient) -> None:
    response = await client.post("/failing-query")
    assert response.status_code == 500
    assert response.json() == {"detail": "Internal Server Error", "request_id": response.headers["x-request-id"]}


@pytest.mark.parametrize("number", range(len(REFUSED)))
async def test_a_query_that_sqlalchemy_refuses_is_a_500_too(client: httpx.AsyncClient, number: int) -> None:
    """It would fail the next time as well."""
    assert (await client.post(f"/failing-query/{number}")).status_code == 500


async def test_the_answer_stays_what_it_is_where_the_connection_has_died(client: httpx.AsyncClient) -> None:
    assert (await client.post("/killed")).status_code == 404


@pytest.mark.parametrize("begin", [False, True])
async def test_after_the_end_of_the_request_a_record_is_committed_and_a_query_refused(
    client: httpx.AsyncClient, db: asyncpg.Connection, *, begin: bool
) -> None:
    """A transaction that it began would be nobody's, and the record with it."""
    closed, record_id = (await client.post("/streamed", params={"begin": begin})).text.split()
    assert closed == "closed"
    assert await db.fetchval("SELECT true FROM mem0_cc.event_log WHERE base_log_id = $1", record_id)


async def open_socket(app: FastAPI, path: str) -> list[Message]:
    received = [{"type": "websocket.connect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return received.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    extensions: dict[str, object] = {"websocket.http.response": {}}
    scope = {"type": "websocket", "path": path, "headers": [], "query_string": b"", "extensions": extensions}
    await app(scope, receive, send)
    return sent


async def test_a_websocket_can_log_too(app: FastAPI, db: asyncpg.Connection) -> None:
    accepted, said, _ = await open_socket(app, "/socket")
    (request_id,) = [value.decode() for name, value in accepted["headers"] if name == b"x-request-id"]
    assert await db.fetchval("SELECT request_id FROM mem0_cc.base_log WHERE id = $1", said["text"]) == request_id


@pytest.fixture
def app_without_database() -> FastAPI:
    app = create_app(Settings(database_url="postgresql://u:secret@127.0.0.1:1/d"))
    app.include_router(router)
    return app


async def test_an_unreachable_database_is_a_503_for_an_endpoints_own_query_too(app_without_database: FastAPI) -> None:
    transport = httpx.ASGITransport(app_without_database)
    async with httpx.AsyncClient(transport=transport, base_url="http://cc") as client:
        response = await client.post("/after-a-query")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"


async def test_an_unreachable_database_closes_a_websocket_and_asks_to_try_again(app_without_database: FastAPI) -> None:
    accepted, closed = await open_socket(app_without_database, "/socket")
    assert (accepted["type"], closed["type"], closed["code"]) == ("websocket.accept", "websocket.close", 1013)


async def test_an_unreachable_database_is_a_503_to_a_websockets_handshake(
    app_without_database: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    answer = (await open_socket(app_without_database, "/early-socket"))[0]
    assert "WS /early-socket: 503, the database is unavailable" in caplog.text
    assert (answer["type"], answer["status"]) == ("websocket.http.response.start", 503)
    assert [name for name, _ in answer["headers"]].count(b"x-request-id") == 1


async def test_an_outage_that_an_endpoint_has_caught_is_a_503_all_the_same(client: httpx.AsyncClient) -> None:
    assert (await client.post("/killed-and-caught")).status_code == 503


async def test_statements_that_somebody_has_dropped_are_one_503_and_prepared_anew(client: httpx.AsyncClient) -> None:
    assert [(await client.post("/deallocating")).status_code for _ in range(3)] == [200, 503, 200]


async def test_a_statement_in_the_wrong_place_is_a_500(client: httpx.AsyncClient) -> None:
    assert (await client.post("/vacuum")).status_code == 500


async def test_a_full_pool_is_a_503_for_an_endpoints_own_query_too(database_url: str) -> None:
    app = create_app(Settings(database_url=database_url, cc_db_pool_size=1, cc_db_timeout_seconds=1))
    app.include_router(router)
    async with (
        app.database._engine.connect(),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client,
    ):
        assert (await client.post("/after-a-query")).status_code == 503
    await app.database.aclose()


async def test_an_endpoints_own_timeout_is_not_the_databases(client: httpx.AsyncClient) -> None:
    assert (await client.post("/own-timeout")).status_code == 500


async def test_connections_that_died_between_two_requests_cost_no_record(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    for _ in range(3):
        answers = await asyncio.gather(*(client.post("/records") for _ in range(10)))
        assert [answer.status_code for answer in answers] == [200] * 10
        await db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def test_a_connection_known_to_be_closed_is_not_handed_out(database: Database) -> None:
    async with database.session() as session:
        connection = await (await session.connection()).get_raw_connection()
        driver = connection.driver_connection
        await session.rollback()
        assert driver is not None
        driver.terminate()
        assert (await session.execute(text("SELECT 1"))).scalar_one() == 1


async def test_an_endpoints_query_that_takes_too_long_is_a_503(database_url: str, db: asyncpg.Connection) -> None:
    app = create_app(Settings(database_url=database_url, cc_db_timeout_seconds=0.3))

    @app.post("/querying")
    async def querying(session: DBSession) -> None:
        await session.execute(text("SELECT * FROM mem0_cc.base_log"))

    async with db.transaction(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        await db.execute("LOCK TABLE mem0_cc.base_log")
        assert (await client.post("/querying")).status_code == 503
    await app.database.aclose()
