"""What becomes of requests and records when PostgreSQL fails. Real processes, real signals."""

import asyncio
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from itertools import product

import httpx
import pytest
from sqlalchemy import AsyncAdaptedQueuePool, make_url

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1
from devtools.service import Service
from devtools.waiting import until
from support.cluster import (
    SLACK,
    TIMEOUT,
    Postgres,
    Run,
    disconnect_all,
    fetch,
    http,
    idle_in_transaction,
    ids,
    locked,
    log,
    logged_ids,
    processes,
    stored,
    waiting,
)


def assert_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert int(answer.headers["retry-after"]) > 0
    body = answer.json()
    assert body.keys() == {"detail", "request_id", "record_id"}
    assert body["detail"] == "The database is unavailable."
    assert body["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("fault", ["stop", "freeze"])
def test_starts_without_its_database_and_recovers_when_it_comes(postgres: Postgres, run: Run, fault: str) -> None:
    getattr(postgres, fault)()
    with run() as service:
        started = time.monotonic()
        assert_unavailable(log(service))
        assert time.monotonic() - started < TIMEOUT + SLACK
        postgres.heal()
        until(lambda: log(service).status_code == HTTPStatus.OK)
        assert service.process.poll() is None


def test_no_request_fails_that_arrives_with_the_news_of_a_restart(postgres: Postgres, service: Service) -> None:
    """The service is asleep while PostgreSQL restarts, and wakes up to closed connections and new requests at once."""
    with ExitStack() as stack, ThreadPoolExecutor(10) as pool:
        clients = [stack.enter_context(httpx.Client(base_url=service.url, timeout=30)) for _ in range(10)]

        def send(client: httpx.Client) -> int:
            return client.post("/test-log", json={}).status_code

        for _ in range(3):
            assert set(pool.map(send, clients)) == {HTTPStatus.OK}
            service.process.send_signal(signal.SIGSTOP)
            postgres.restart()
            answers = [pool.submit(send, client) for client in clients]
            time.sleep(0.2)  # for the requests to be in the sockets; were it too short, it would prove less
            service.process.send_signal(signal.SIGCONT)
            assert {answer.result() for answer in answers} == {HTTPStatus.OK}


def test_every_acknowledged_record_survives_sigkill_under_load(
    postgres: Postgres, service: Service, database_url: str
) -> None:
    answers: list[httpx.Response] = []
    stop = threading.Event()
    printed = len(service.log)

    def load() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            while not stop.is_set():
                answers.append(client.post("/test-log", json={"message": "hello"}))

    def acknowledged_since(seen: int) -> int:
        return sum(answer.status_code == HTTPStatus.OK for answer in answers[seen:])

    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load) for _ in range(8)]
        try:
            for _ in range(3):
                seen = len(answers)
                until(lambda seen=seen: acknowledged_since(seen) > 50)  # type: ignore[misc]
                postgres.kill()
                postgres.start()
            seen = len(answers)
            until(lambda: acknowledged_since(seen) > 50)
        finally:
            stop.set()
        for each in loads:
            each.result()

    acknowledged: set[str] = set()
    for answer in answers:
        if answer.status_code == HTTPStatus.OK:
            acknowledged |= logged_ids(answer)
        else:
            assert_unavailable(answer)
            assert answer.json()["record_id"]
    assert acknowledged <= ids(database_url)
    assert stored(database_url)["half"] == 0
    assert "Traceback" not in service.log[printed:]


def test_a_frozen_database_does_not_pile_up_sockets(postgres: Postgres, run: Run) -> None:
    with run(CC_DB_TIMEOUT_SECONDS="0.2") as service, ThreadPoolExecutor(10) as pool:
        until(lambda: log(service).status_code == HTTPStatus.OK)
        list(pool.map(lambda _: log(service), range(20)))
        [process] = processes(service)
        before = process.num_fds()
        postgres.freeze()
        for _ in range(5):
            list(pool.map(lambda _: log(service), range(20)))
        until(lambda: process.num_fds() <= before + 3, seconds=5)


@pytest.mark.parametrize("path", ["/test-log", "/joined"])
def test_a_pool_of_two_has_two_connections_however_many_wait(run: Run, database_url: str, path: str) -> None:
    settings = {"CC_DB_POOL_SIZE": "2", "CC_DB_TIMEOUT_SECONDS": "30"}  # which no slow machine reaches
    with run("--app-dir=tests", app="support.endpoints:app", **settings) as service, ThreadPoolExecutor(50) as pool:

        def send(_: int) -> int:
            return http.post(f"{service.url}{path}", json={"content": "hello"}).status_code

        with locked(database_url):
            answers = [pool.submit(send, number) for number in range(50)]
            until(lambda: waiting(database_url) >= 2)
            time.sleep(0.5)  # for others to come; were it too short, it would prove less
            assert waiting(database_url) == 2
        assert {answer.result() for answer in answers} == {HTTPStatus.OK}


READ_ONLY = "ALTER DATABASE {name} SET default_transaction_read_only = on"
AT_COMMIT = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON mem0_cc.base_log DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION refuse()"""


@pytest.mark.parametrize("path", ["/test-log", "/joined"])
@pytest.mark.parametrize(
    ("statement", "status"),
    [
        pytest.param(READ_ONLY, 503, id="read-only"),
        pytest.param(AT_COMMIT.replace("{sqlstate}", "53100"), 503, id="disk full at commit"),
        pytest.param(AT_COMMIT.replace("{sqlstate}", "XX000"), 503, id="internal error at commit"),
        pytest.param(AT_COMMIT.replace("{sqlstate}", "23514"), 500, id="refused at commit"),
        pytest.param("ALTER TABLE mem0_cc.base_log RENAME TO elsewhere", 500, id="table missing"),
    ],
)
def test_what_is_not_committed_is_never_acknowledged(
    service: Service, database_url: str, path: str, statement: str, status: int
) -> None:
    name = make_url(database_url).database
    fetch(database_url, statement.replace("{name}", str(name)))
    disconnect_all(database_url)
    # An endpoint's own query may be the one that finds its connection dead, which is a 503 of its own.
    until(lambda: http.post(f"{service.url}/query").status_code == HTTPStatus.OK)
    try:
        answer = http.post(f"{service.url}{path}", json={"content": "hello"})
    finally:
        fetch(
            database_url,
            f"""ALTER DATABASE {name} RESET ALL;
            DROP FUNCTION IF EXISTS refuse CASCADE; ALTER TABLE IF EXISTS mem0_cc.elsewhere RENAME TO base_log;""",
        )
        disconnect_all(database_url)
    assert answer.status_code == status
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        assert_unavailable(answer)
    assert log(service).status_code == HTTPStatus.OK


@pytest.mark.parametrize("path", ["/query", "/joined"])
@pytest.mark.parametrize("fault", ["stop", "freeze"])
def test_an_endpoint_that_queries_is_a_503_within_twice_the_bound_and_recovers(
    postgres: Postgres, service: Service, path: str, fault: str
) -> None:
    """Twice the bound: asyncpg waits as long again for the server to confirm that the query is cancelled."""

    def send() -> httpx.Response:
        return http.post(f"{service.url}{path}", json={"content": "hello"})

    until(lambda: send().status_code == HTTPStatus.OK)
    getattr(postgres, fault)()
    started = time.monotonic()
    assert_unavailable(send())
    assert time.monotonic() - started < 2 * TIMEOUT + SLACK
    postgres.heal()
    until(lambda: send().status_code == HTTPStatus.OK)


def test_an_endpoint_that_refuses_while_the_database_is_frozen_is_answered_within_twice_the_bound(
    postgres: Postgres, service: Service, database_url: str
) -> None:
    """The rollback waits for the frozen server."""
    until(lambda: log(service).status_code == HTTPStatus.OK)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(http.post, f"{service.url}/refuse", json={"seconds": 1})
        until(lambda: idle_in_transaction(database_url) == 1)
        postgres.freeze()
        started = time.monotonic()
        assert sent.result().status_code == HTTPStatus.CONFLICT
        assert time.monotonic() - started < 1 + 2 * TIMEOUT + SLACK
    postgres.thaw()
    until(lambda: log(service).status_code == HTTPStatus.OK)


HEAD = b"POST /test-log HTTP/1.1\r\nHost: cc\r\nContent-Type: application/json\r\n"


LEFT = {
    "in the headers": HEAD,
    "before the body": HEAD + b"Content-Length: 1000\r\n\r\n",
    "in the body": HEAD + b'Content-Length: 1000\r\n\r\n{"content": "',
    "in a chunk": HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"con',
    "before the answer": HEAD + b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_client_that_leaves_harms_nothing(run: Run, database_url: str, parser: str) -> None:
    with run(f"--http={parser}", CC_DB_POOL_SIZE="2") as service:
        for request, _ in product(LEFT.values(), range(10)):
            with socket.create_connection(("127.0.0.1", service.port)) as client:
                client.sendall(request)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave with a reset
        assert log(service).status_code == HTTPStatus.OK
        service.stop()
        assert "Traceback" not in service.log
        assert "ERROR" not in service.log
    assert stored(database_url)["half"] == 0


async def test_a_transaction_whose_task_is_cancelled_is_whole_or_not_there_and_the_pool_recovers(
    database_url: str,
) -> None:
    """It is cancelled at sixty moments, from before the call begins to after it has ended."""
    async with Database(Settings(database_url=database_url, cc_db_pool_size=1)) as database, asyncio.timeout(60):
        pool = database.engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)

        async def write() -> None:
            async with database.session() as session, session.begin():
                await log_l1(session, EventRecord("cancelled", {}))

        await write()
        started = time.monotonic()
        for _ in range(10):
            await write()
        usual = (time.monotonic() - started) / 10
        for moment in range(60):
            task = asyncio.create_task(write())
            await asyncio.sleep(1.5 * usual * moment / 60)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
            assert pool.checkedout() == 0
        await write()
    assert (await asyncio.to_thread(stored, database_url))["half"] == 0
