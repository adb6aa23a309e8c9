"""A PostgreSQL of the tests' own, to be stopped, killed, frozen and started again, and what to ask about a service."""

import asyncio
import contextlib
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from typing import Any

import asyncpg
import httpx
import psutil

from devtools.otlp import otlp_receiver
from devtools.ports import free_port
from devtools.postgres import Server
from devtools.service import Service

TIMEOUT = 1.0
"""CC_DB_TIMEOUT_SECONDS in these tests, so that what is bounded by it ends soon."""

SLACK = 2.0
"""Seconds that a busy machine with two cores may take on top of a bound."""

Run = Callable[..., AbstractContextManager[Service]]
"""Starts the service on the test's database; see `running_service`."""


TLS = ssl.create_default_context()
"""No request uses TLS, but httpx makes a context for each client, which takes longer than a request."""


def request(method: str, url: str, **options: Any) -> httpx.Response:
    """Send a request on a connection of its own, so that threads can do it at the same time."""
    return httpx.request(method, url, timeout=30, verify=TLS, **options)


post = partial(request, "POST")


class Postgres:
    """A cluster whose processes can be hurt."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.start = server.start
        self.stop = server.stop

    def signal(self, number: int) -> None:
        """Send a signal to every process of the cluster, the postmaster first, so that it starts no other."""
        assert self.server.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self.server.process.pid)
            children = postmaster.children(recursive=True)
            postmaster.send_signal(number)
            for process in {*children, *postmaster.children(recursive=True)}:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def kill(self) -> None:
        """End all of it at once, as a machine's failure does."""
        self.signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Keep every socket open and never answer again: the kernel goes on accepting connections."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop and start it as an update does: every connection is closed."""
        self.stop()
        self.start()

    def heal(self) -> None:
        """Undo whatever a test has done."""
        if self.server.process is not None and self.server.process.poll() is None:
            self.thaw()
        else:
            self.start()


def fetch(url: str, query: str) -> list[asyncpg.Record]:
    """Run one query, or several statements, on a connection of its own."""

    async def run() -> list[asyncpg.Record]:
        # Also where a test has made the database read-only, to undo it.
        connection = await asyncpg.connect(url, server_settings={"default_transaction_read_only": "off"})
        try:
            if ";" in query:
                await connection.execute(query)
                return []
            rows: list[asyncpg.Record] = await connection.fetch(query)
            return rows
        finally:
            await connection.close()

    return asyncio.run(run())


@contextlib.contextmanager
def locked(url: str, table: str = "mem0_cc.base_log") -> Iterator[None]:
    """Make every statement that uses a table wait."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))
        runner.run(connection.execute(f"BEGIN; LOCK TABLE {table}"))
        try:
            yield
        finally:
            runner.run(connection.close())


def waiting(url: str, condition: str = "wait_event_type = 'Lock'") -> int:
    """Count the connections that wait for a lock, or for something else."""
    query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {condition}"
    return int(fetch(url, query)[0]["count"])


def stored(url: str) -> dict[str, int]:
    """Count what is there, and what is there by half."""
    [row] = fetch(
        url,
        """
        SELECT (SELECT count(*) FROM mem0_cc.base_log) AS base,
               (SELECT count(*) FROM mem0_cc.prompt_trace) AS prompt,
               (SELECT count(*) FROM mem0_cc.event_log) AS event,
               (SELECT count(*) FROM mem0_cc.base_log b
                WHERE (SELECT count(*) FROM mem0_cc.prompt_trace WHERE base_log_id = b.id)
                    + (SELECT count(*) FROM mem0_cc.event_log WHERE base_log_id = b.id) <> 1) AS half
        """,
    )
    return dict(row)


def ids(url: str) -> set[str]:
    """Return the ids of all records, each with its base row."""
    children = "SELECT base_log_id FROM mem0_cc.prompt_trace UNION ALL SELECT base_log_id FROM mem0_cc.event_log"
    return {str(row["id"]) for row in fetch(url, f"SELECT id FROM mem0_cc.base_log WHERE id IN ({children})")}


def log(service: Service, **body: Any) -> httpx.Response:
    """Send one `POST /test-log` on a connection of its own."""
    return post(f"{service.url}/test-log", json=body)


def progress(line: str) -> None:
    """Print a line of a test that takes long."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def processes(service: Service) -> list[psutil.Process]:
    """Return the service's process and its workers."""
    process = psutil.Process(service.process.pid)
    return [process, *process.children(recursive=True)]


FAULTS = ("down", "hanging", "500")
"""What can be the matter with an OTLP receiver."""


@contextlib.contextmanager
def faulty_receiver(fault: str) -> Iterator[str]:
    """Yield the address of a receiver that is of no use."""
    if fault == "500":
        with otlp_receiver(status=500, keep=False) as receiver:
            yield receiver.endpoint
    elif fault == "down":
        yield f"http://127.0.0.1:{free_port()}"
    else:
        with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:  # accepted by the kernel, never read
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class Client:
    """One connection to a service, with as little of its own as can be: it is what is not measured."""

    def __init__(self, service: Service) -> None:
        self.connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
        self.close = self.connection.close
        self.seconds: list[float] = []

    def send(self, requests: int) -> None:
        """Send requests one after the other, and keep how long each took."""
        for _ in range(requests):
            started = time.perf_counter()
            self.connection.request("POST", "/test-log", b"{}", {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            answer.read()
            self.seconds.append(time.perf_counter() - started)
            assert answer.status == HTTPStatus.OK
