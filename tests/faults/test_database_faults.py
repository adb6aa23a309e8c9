"""What becomes of requests and records when PostgreSQL fails. Real processes, real signals."""

import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from itertools import product

import httpx
import pytest

from devtools.service import Service
from devtools.waiting import until
from support.cluster import (
    SLACK,
    TIMEOUT,
    Postgres,
    Run,
    log,
    post,
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


@pytest.mark.parametrize("path", ["/query", "/joined"])
@pytest.mark.parametrize("fault", ["stop", "freeze"])
def test_an_endpoint_that_queries_is_a_503_within_twice_the_bound_and_recovers(
    postgres: Postgres, service: Service, path: str, fault: str
) -> None:
    """Twice the bound: asyncpg waits as long again for the server to confirm that the query is cancelled."""

    def send() -> httpx.Response:
        return post(f"{service.url}{path}", json={"content": "hello"})

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
        sent = pool.submit(post, f"{service.url}/refuse", json={"seconds": 1})
        until(lambda: waiting(database_url, "state = 'idle in transaction'") == 1)
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
