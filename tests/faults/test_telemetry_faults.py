"""What becomes of requests when the other end of the exporter fails, and of spans when the process ends."""

import signal
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from devtools.otlp import otlp_receiver
from devtools.service import running_service
from devtools.traces import ROWS, by_trace, is_complete
from devtools.waiting import until
from support.cluster import (
    FAULTS,
    SLACK,
    Client,
    Postgres,
    Run,
    faulty_receiver,
    fetch,
    locked,
    log,
    progress,
    waiting,
)

SHUTDOWN = 10.0
"""Seconds within which the process must have ended, whatever the receiver does."""


def medians_of_a_request(database_url: str, tmp_path: Path, fault: str) -> dict[str, float]:
    """Measure, in turns on one machine, services of their own. Returns milliseconds."""
    with ExitStack() as stack:
        works = stack.enter_context(otlp_receiver(keep=False)).endpoint
        fails = stack.enter_context(faulty_receiver(fault))
        clients = {}
        for name, environment in {
            "tracing off": {},
            "no receiver": {"OTEL_EXPORTER_OTLP_ENDPOINT": fails, "OTEL_TRACES_EXPORTER": "none"},
            "works": {"OTEL_EXPORTER_OTLP_ENDPOINT": works},
            fault: {"OTEL_EXPORTER_OTLP_ENDPOINT": fails},
        }.items():
            service = stack.enter_context(
                running_service(database_url, tmp_path / f"{name}.log", "--no-access-log", **environment)
            )
            clients[name] = stack.enter_context(closing(Client(service)))
        for _ in range(60):
            for client in clients.values():
                client.send(50)
    return {name: 1000 * statistics.median(client.seconds[500:]) for name, client in clients.items()}


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
def test_a_receiver_that_fails_costs_a_request_less_than_a_tenth(database_url: str, tmp_path: Path, fault: str) -> None:
    """The receiver that fails is compared with one that works, and with spans that are recorded but not exported.

    The comparison is made three times, because two processes of the same service differ by several per cent for as
    long as they live.
    """
    measured = [medians_of_a_request(database_url, tmp_path, fault) for _ in range(3)]
    for medians in measured:
        progress("median of a request, ms: " + ", ".join(f"{name} {median:.2f}" for name, median in medians.items()))
    for name in ("no receiver", "works"):
        assert statistics.median(medians[fault] / medians[name] for medians in measured) < 1.1


OTLP = {"OTEL_EXPORTER_OTLP_ENDPOINT": "{endpoint}"}
TOKEN = {"LOGFIRE_TOKEN": "pylf_v1_us_0123456789", "LOGFIRE_BASE_URL": "{endpoint}"}


@pytest.mark.parametrize(
    ("destination", "fault", "number"),
    [
        *((OTLP, fault, signal.SIGTERM) for fault in FAULTS),
        *((destination, "hanging", signal.SIGINT) for destination in (OTLP, TOKEN)),
    ],
    ids=[*FAULTS, "hanging, SIGINT", "hanging, token, SIGINT"],
)
def test_a_receiver_that_fails_delays_neither_requests_nor_the_end(
    run: Run, destination: dict[str, str], fault: str, number: int
) -> None:
    """After SIGINT the interpreter runs the exit handlers that libraries have registered; after SIGTERM it does not."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(faulty_receiver(fault))
        environment = {name: value.replace("{endpoint}", endpoint) for name, value in destination.items()}
        service = stack.enter_context(run(**environment))
        with closing(Client(service)) as client:
            client.send(200)
        assert max(client.seconds) < 1 + SLACK
        service.stop(SHUTDOWN, number)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_finishes_requests_and_delivers_their_spans(
    run: Run, database_url: str, workers: int
) -> None:
    """Every answer is a 200, its records are there, and its whole trace has arrived."""
    answers: list[httpx.Response] = []

    with (
        otlp_receiver() as receiver,
        run(
            f"--workers={workers}", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, CC_DB_TIMEOUT_SECONDS="5"
        ) as service,
    ):

        def load() -> None:
            while True:
                try:
                    # A connection each: no request can be on its way on one that the server closes.
                    answers.append(log(service))
                except httpx.TransportError:
                    return  # refused: it has stopped listening

        with ThreadPoolExecutor(8) as pool:
            loads = [pool.submit(load) for _ in range(8)]
            until(lambda: len(answers) > 100)
            service.process.terminate()
            for each in loads:
                each.result()
        code = service.process.wait(SHUTDOWN)

    assert code in (0, -signal.SIGTERM)  # ended by the signal it was sent, which is how uvicorn says that all went well
    assert {answer.status_code for answer in answers} == {HTTPStatus.OK}
    rows = {tuple(row) for row in fetch(database_url, ROWS)}
    traces = by_trace(receiver.spans)
    for answer in answers:
        assert is_complete(answer.json(), traces[answer.json()["trace_id"]], rows)


def test_sigterm_does_not_wait_for_a_database_that_hangs(postgres: Postgres, run: Run, database_url: str) -> None:
    """Each of the ten connections would wait for the bound, one after the other."""
    with run(CC_DB_TIMEOUT_SECONDS="5", CC_DB_BATCH_SIZE="1") as service, ThreadPoolExecutor(10) as pool:
        with locked(database_url):
            answers = [pool.submit(log, service) for _ in range(10)]
            until(lambda: waiting(database_url) == 10)
        assert {answer.result().status_code for answer in answers} == {HTTPStatus.OK}
        postgres.freeze()
        assert service.stop(SHUTDOWN) in (0, -signal.SIGTERM)
