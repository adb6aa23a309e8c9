"""What becomes of requests and records when PostgreSQL fails. Real processes, real signals."""

import asyncio
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from http import HTTPStatus
from itertools import product

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1
from devtools.service import Service, running_service
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
    assert body.keys() == {"detail", "request_id", "record_id", "committed"}
    assert body["detail"] == "The database is unavailable."
    assert body["request_id"] == answer.headers["x-request-id"]


def test_starts_without_its_database_and_recovers_when_it_comes(postgres: Postgres, run: Run) -> None:
    postgres.stop()
    with run() as service:
        started = time.monotonic()
        assert_unavailable(log(service))
        assert time.monotonic() - started < TIMEOUT + SLACK
        postgres.start()
        until(lambda: log(service).status_code == HTTPStatus.OK)
        assert service.process.poll() is None


def test_starts_before_its_first_connection_can_be_made_and_recovers(postgres: Postgres, run: Run) -> None:
    postgres.freeze()
    with run() as service:
        started = time.monotonic()
        assert_unavailable(log(service))
        assert time.monotonic() - started < TIMEOUT + SLACK
        postgres.thaw()
        until(lambda: log(service).status_code == HTTPStatus.OK)


def test_no_request_fails_after_a_restart_that_closed_every_connection(
    postgres: Postgres, service: Service, database_url: str
) -> None:
    before = stored(database_url)["base"]
    with ThreadPoolExecutor(10) as pool:
        for _ in range(3):
            assert {answer.status_code for answer in pool.map(lambda _: log(service), range(30))} == {HTTPStatus.OK}
            postgres.restart()
        assert {answer.status_code for answer in pool.map(lambda _: log(service), range(30))} == {HTTPStatus.OK}
    assert stored(database_url)["base"] == before + 240


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
            acknowledged |= set(answer.json()["committed"])
    assert acknowledged <= ids(database_url)
    assert stored(database_url)["half"] == 0
    assert "Traceback" not in service.log[printed:]


def test_a_frozen_database_is_a_503_within_the_bound_for_30_callers_at_once(postgres: Postgres, run: Run) -> None:
    """The bound is three seconds: asyncpg alone would take twice as long, and less could not be told from slack."""
    seconds = 3.0
    with run(CC_DB_TIMEOUT_SECONDS=str(seconds)) as service, ThreadPoolExecutor(30) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: log(service), range(30))} == {HTTPStatus.OK}
        postgres.freeze()
        started = time.monotonic()
        for answer in pool.map(lambda _: log(service), range(30)):
            assert_unavailable(answer)
        assert time.monotonic() - started < seconds + SLACK
        postgres.thaw()
        until(lambda: log(service).status_code == HTTPStatus.OK)
        assert {answer.status_code for answer in pool.map(lambda _: log(service), range(30))} == {HTTPStatus.OK}
        assert "Traceback" not in service.log


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


@pytest.fixture(scope="module")
def service_with_two(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a pool of two connections, and a bound that no slow machine reaches: it turns no request away."""
    log_path = tmp_path_factory.mktemp("two") / "service.log"
    environment = {"CC_DB_POOL_SIZE": "2", "CC_DB_TIMEOUT_SECONDS": "30"}
    arguments = ("--no-access-log", "--app-dir=tests")
    with running_service(database_url, log_path, *arguments, app="support.endpoints:app", **environment) as service:
        yield service


def test_a_pool_of_two_serves_200_clients(service_with_two: Service, database_url: str) -> None:
    with ThreadPoolExecutor(200) as pool:
        before = stored(database_url)["base"]
        answers = pool.map(lambda _: log(service_with_two), range(400))
        assert {answer.status_code for answer in answers} == {HTTPStatus.OK}
        assert stored(database_url)["base"] == before + 800


@pytest.mark.parametrize("path", ["/test-log", "/joined"])
def test_a_pool_of_two_has_two_connections_however_many_wait(
    service_with_two: Service, database_url: str, path: str
) -> None:
    def send(_: int) -> int:
        return http.post(f"{service_with_two.url}{path}", json={"content": "hello"}).status_code

    with ThreadPoolExecutor(50) as pool:
        with locked(database_url):
            answers = [pool.submit(send, number) for number in range(50)]
            until(lambda: waiting(database_url) >= 2)
            time.sleep(0.5)  # for others to come; were it too short, it would prove less
            assert waiting(database_url) == 2
        assert {answer.result() for answer in answers} == {HTTPStatus.OK}


def test_200_clients_of_an_exhausted_pool_wait_no_longer_than_the_bound(service: Service, database_url: str) -> None:
    until(lambda: log(service).status_code == HTTPStatus.OK)
    with ThreadPoolExecutor(200) as pool:
        with locked(database_url):
            started = time.monotonic()
            answers = list(pool.map(lambda _: log(service), range(200)))
            assert time.monotonic() - started < TIMEOUT + SLACK
        for answer in answers:
            assert_unavailable(answer)
    until(lambda: log(service).status_code == HTTPStatus.OK)


READ_ONLY = "ALTER DATABASE {name} SET default_transaction_read_only = on"
LOCK_TIMEOUT = "ALTER DATABASE {name} SET lock_timeout = '100ms'"
RAISES = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END $$;
CREATE {kind} TRIGGER refuse AFTER INSERT ON mem0_cc.base_log {deferred} FOR EACH ROW EXECUTE FUNCTION refuse()"""
AT_ONCE = RAISES.replace("{kind}", "").replace("{deferred}", "")
AT_COMMIT = RAISES.replace("{kind}", "CONSTRAINT").replace("{deferred}", "DEFERRABLE INITIALLY DEFERRED")


@pytest.mark.parametrize("path", ["/test-log", "/joined"])
@pytest.mark.parametrize(
    ("statement", "status"),
    [
        pytest.param(READ_ONLY, 503, id="read-only"),
        pytest.param(LOCK_TIMEOUT, 503, id="locked"),
        pytest.param(AT_ONCE.replace("{sqlstate}", "53100"), 503, id="disk full"),
        pytest.param(AT_COMMIT.replace("{sqlstate}", "53100"), 503, id="disk full at commit"),
        pytest.param(AT_COMMIT.replace("{sqlstate}", "40001"), 503, id="serialization failure at commit"),
        pytest.param(AT_COMMIT.replace("{sqlstate}", "XX000"), 503, id="internal error at commit"),
        pytest.param(AT_ONCE.replace("{sqlstate}", "23514"), 500, id="refused"),
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
        with locked(database_url) if statement == LOCK_TIMEOUT else nullcontext():
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


def test_an_endpoints_own_time_out_is_not_the_databases_fault(service: Service) -> None:
    assert http.post(f"{service.url}/time-out").status_code == HTTPStatus.INTERNAL_SERVER_ERROR


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


@pytest.mark.parametrize("transaction", [False, True], ids=["alone", "joined"])
async def test_a_record_whose_caller_is_cancelled_is_whole_or_not_there_and_the_pool_recovers(
    database_url: str, *, transaction: bool
) -> None:
    """The caller is cancelled at sixty moments, from before the call begins to after it has ended."""
    database = Database(Settings(database_url=SecretStr(database_url), cc_db_pool_size=1))
    engine = database.session().bind
    assert isinstance(engine, AsyncEngine)

    async def write() -> None:
        async with database.session() as session:
            if transaction:
                await session.begin()
            await log_l1(session, EventRecord("cancelled", {}))
            await session.commit()

    async with asyncio.timeout(60):
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
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await write()
    await database.aclose()
    counted = await asyncio.to_thread(stored, database_url)
    assert counted["event"] >= 1
    assert counted["half"] == 0
