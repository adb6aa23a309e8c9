"""What uvicorn's `--limit-concurrency` does to requests that would wait for the database. See docs/operations.md."""

import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import httpx
import psutil

from devtools.service import Service
from devtools.waiting import until
from support.cluster import SLACK, Run, locked, log, processes, stored

LIMIT = 6
ADMITTED = LIMIT - 1
"""uvicorn counts the connection that asks, too."""


def connections(service: Service) -> int:
    """Count the clients' connections that the service has accepted."""
    [process] = processes(service)
    found = process.net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == service.port for each in found)


def assert_refused_by_uvicorn(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.text) == (HTTPStatus.SERVICE_UNAVAILABLE, "Service Unavailable")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["connection"] == "close"
    assert not {"x-request-id", "retry-after"} & answer.headers.keys()


def test_a_request_over_the_limit_is_a_503_at_once_and_no_acknowledged_record_is_lost(
    run: Run, database_url: str
) -> None:
    before = stored(database_url)
    # The bound on waiting is one that no slow machine reaches: only the limit can refuse a request here.
    settings = {"CC_DB_POOL_SIZE": "2", "CC_DB_TIMEOUT_SECONDS": "30"}
    with run("--limit-concurrency", str(LIMIT), **settings) as service, ThreadPoolExecutor(ADMITTED) as pool:
        with locked(database_url):
            waiting = [pool.submit(log, service) for _ in range(ADMITTED)]
            until(lambda: connections(service) == ADMITTED, what="the admitted requests have arrived")
            for _ in range(3):
                started = time.monotonic()
                assert_refused_by_uvicorn(log(service))
                assert time.monotonic() - started < SLACK
            assert not any(each.done() for each in waiting)
        answers = [each.result() for each in waiting]
        assert {answer.status_code for answer in answers} == {HTTPStatus.OK}
        until(lambda: log(service).status_code == HTTPStatus.OK, what="the next request is answered")
        assert service.log.count("Exceeded concurrency limit.") >= 3
        assert "Traceback" not in service.log
    after = stored(database_url)
    assert after["base"] == before["base"] + 2 * ADMITTED + 2
    assert after["half"] == 0
