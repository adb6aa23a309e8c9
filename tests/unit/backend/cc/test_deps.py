import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

import anyio
import asyncpg
import httpx
import pytest
from fastapi import APIRouter, Depends, HTTPException, Request, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import AsyncAdaptedQueuePool, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.cc_main import Service
from backend.cc.deps import DBSession, LogL1, get_db_session
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1 as log_into
from support.clients import TestClient
from support.cluster import fetch

EVENT = EventRecord("tool.called", {})
COUNT = "SELECT (SELECT count(*) FROM things), (SELECT count(*) FROM mem0_cc.event_log)"
INSERT = text("INSERT INTO things DEFAULT VALUES")
ROLLBACKS = {"502": HTTPException(502), "500": RuntimeError()}

router = APIRouter()


async def user(session: DBSession) -> None:
    """An authentication, which begins the request's transaction."""
    await session.execute(text("SELECT 1"))


User = Annotated[None, Depends(user)]


@router.post("/written")
async def written(_: User, session: DBSession, log_l1: LogL1) -> UUID:
    await session.execute(INSERT)
    return await log_l1(EVENT)


@router.post("/failed/{status}")
async def failed(_: User, status: str, session: DBSession, log_l1: LogL1) -> None:
    await session.execute(INSERT)
    await log_into(session, EVENT)
    await log_l1(EVENT, request_id="audit", record_id=UUID(int=7))
    raise ROLLBACKS[status]


@router.post("/ignoring-an-error")
async def ignoring_an_error(session: DBSession) -> None:
    await session.execute(INSERT)
    with contextlib.suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))


@router.post("/killed")
async def killed(session: DBSession) -> None:
    pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    async with session.bind.connect() as other:  # type: ignore[union-attr]
        await other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    raise HTTPException(404)


@router.post("/streamed")
async def streamed(session: DBSession, log_l1: LogL1, *, begin: bool) -> StreamingResponse:
    if begin:
        await session.execute(INSERT)

    async def stream() -> AsyncIterator[str]:
        try:
            await session.execute(text("SELECT 1"))
        except InvalidRequestError:
            yield "closed "
        yield str(await log_l1(EVENT))

    return StreamingResponse(stream())


@router.websocket("/socket")
async def socket(websocket: WebSocket, session: DBSession, log_l1: LogL1) -> None:
    await websocket.accept()
    await session.execute(INSERT)
    async for _ in websocket.iter_text():
        await websocket.send_text(str(await log_l1(EVENT)))


@pytest.fixture
async def app(app: Service, db: asyncpg.Connection) -> Service:
    await db.execute("CREATE TABLE things (id serial PRIMARY KEY)")
    app.include_router(router)
    return app


async def count(db: asyncpg.Connection) -> tuple[int, int]:
    """Count the things and the events that are committed."""
    return tuple(await db.fetchrow(COUNT))


async def test_what_an_endpoint_writes_is_committed_when_the_answer_arrives(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    assert (await client.post("/written")).status_code == 200
    assert await count(db) == (1, 1)


@pytest.mark.parametrize("status", ROLLBACKS)
async def test_an_error_rolls_back_what_is_open_and_keeps_what_log_l1_has_returned(
    client: httpx.AsyncClient, db: asyncpg.Connection, status: str
) -> None:
    assert (await client.post(f"/failed/{status}")).status_code == int(status)
    assert await count(db) == (0, 1)
    row = await db.fetchrow("SELECT id, request_id FROM mem0_cc.base_log")
    assert tuple(row) == (UUID(int=7), "audit")
    assert await db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == 0


async def test_a_transaction_that_goes_on_after_an_error_is_never_a_2xx(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and calls it no error."""
    assert (await client.post("/ignoring-an-error")).status_code == 500
    assert await count(db) == (0, 0)
    assert (await client.post("/written")).status_code == 200


async def test_the_answer_stays_what_it_is_if_the_connection_has_died(client: httpx.AsyncClient) -> None:
    assert (await client.post("/killed")).status_code == 404


async def test_a_request_that_is_cancelled_again_and_again_gives_a_connection_back_that_works(app: Service) -> None:
    """As anyio cancels, at every `await` on the way out."""
    request = Request({"type": "http", "state": {"database": app.database}})
    pool = app.database.engine.pool
    assert isinstance(pool, AsyncAdaptedQueuePool)
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
            while pool.checkedout():  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
    assert len(set(pids)) == 1


@pytest.mark.parametrize("begin", [False, True])
async def test_after_the_end_of_the_request_a_record_is_committed_and_a_query_refused(
    client: httpx.AsyncClient, db: asyncpg.Connection, *, begin: bool
) -> None:
    """A transaction that it began would be nobody's, and the record with it."""
    closed, record_id = (await client.post("/streamed", params={"begin": begin})).text.split()
    assert closed == "closed"
    assert await count(db) == (begin, 1)
    assert await db.fetchval("SELECT id FROM mem0_cc.base_log") == UUID(record_id)


def test_what_a_websocket_has_acknowledged_is_committed_at_once_and_its_own_writes_at_its_end(
    app: Service, database_url: str
) -> None:
    def look() -> tuple[int, int]:
        [row] = fetch(database_url, COUNT)
        return tuple(row)

    with TestClient(app) as client, client.websocket_connect("/socket") as websocket:
        for number in (1, 2):
            websocket.send_text("")
            websocket.receive_text()
            assert look() == (0, number)
        websocket.close()
    assert look() == (1, 2)


async def test_an_override_of_the_session_is_what_everything_is_written_to(
    app: Service, client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    """SQLAlchemy's recipe for tests: all of it is seen inside, and rolled back at the end."""
    async with app.database.engine.connect() as connection:
        transaction = await connection.begin()

        async def override() -> AsyncIterator[AsyncSession]:
            async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
                yield session
                await session.commit()

        app.dependency_overrides[get_db_session] = override
        for number in (1, 2):
            record_id = (await client.post("/written")).json()
            things = (await connection.execute(text("SELECT count(*) FROM things"))).scalar_one()
            event = (
                await connection.execute(text("SELECT max(base_log_id::text) FROM mem0_cc.event_log"))
            ).scalar_one()
            assert (things, event) == (number, record_id)
        await transaction.rollback()
    assert await count(db) == (0, 0)
