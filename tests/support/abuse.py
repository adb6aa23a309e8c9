"""Requests that no client library would send, and what the database holds afterwards."""

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import asyncpg
import httpx

from devtools.service import Service

JSON = (b"Content-Type", b"application/json")

Headers = Iterable[tuple[bytes, bytes]]


@dataclass
class Answer:
    """What a request got."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Abused:
    """A running service and a connection to its database."""

    service: Service
    runner: asyncio.Runner
    database: asyncpg.Connection

    def send(self, body: bytes, *headers: tuple[bytes, bytes]) -> Answer:
        """Send one `POST /test-log`, every byte as it is given, with Host and Content-Length added."""
        lines = [(b"Host", b"cc"), *headers, (b"Content-Length", b"%d" % len(body))]
        head = b"POST /test-log HTTP/1.1\r\n" + b"".join(b"%b: %b\r\n" % line for line in lines)
        with socket.create_connection(("127.0.0.1", self.service.port), timeout=30) as client:
            # A server may answer, and close, before it has read everything.
            with contextlib.suppress(ConnectionError):
                client.sendall(head + b"\r\n" + body)
            response = http.client.HTTPResponse(client)
            response.begin()
            return Answer(response.status, response.headers, response.read())

    def fetch(self, query: str, *values: Any) -> list[asyncpg.Record]:
        """Run a query."""
        rows: list[asyncpg.Record] = self.runner.run(self.database.fetch(query, *values))
        return rows

    @cached_property
    def documented(self) -> set[str]:
        """The statuses that the service's own description names for `POST /test-log`."""
        openapi = httpx.get(f"{self.service.url}/openapi.json").json()
        return set(openapi["paths"]["/test-log"]["post"]["responses"])

    def records(self) -> int:
        """Count all rows of all tables."""
        [row] = self.fetch(
            "SELECT (SELECT count(*) FROM mem0_cc.base_log) + (SELECT count(*) FROM mem0_cc.prompt_trace)"
            " + (SELECT count(*) FROM mem0_cc.event_log) AS rows"
        )
        return int(row["rows"])

    def prompt(self, answer: Answer) -> dict[str, Any]:
        """Return the prompt that an answer has acknowledged."""
        [row] = self.fetch(
            "SELECT role, content, tokens_in, tokens_out FROM mem0_cc.prompt_trace WHERE base_log_id = $1::uuid",
            answer.json()["prompt_trace_id"],
        )
        return dict(row)

    def event(self, answer: Answer) -> tuple[str, Any]:
        """Return the event that an answer has acknowledged: its type and its payload, numbers exact."""
        [row] = self.fetch(
            "SELECT event_type, payload::text FROM mem0_cc.event_log WHERE base_log_id = $1::uuid",
            answer.json()["event_log_id"],
        )
        return row["event_type"], json.loads(row["payload"], parse_float=Decimal)
