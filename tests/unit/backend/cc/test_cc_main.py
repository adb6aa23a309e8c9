import gc
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from backend.cc.cc_main import create_app, lifespan
from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseUnavailableError
from backend.cc.services.logging import EventRecord, log_l1
from devtools import ROOT
from devtools.otlp import Receiver, otlp_receiver
from devtools.service import running_service
from support.wire import counted

CALLERS_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{CALLERS_TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as receiver:
        yield receiver


def named(spans: tuple[ReadableSpan, ...], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def test_a_request_is_one_whole_trace(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    answer = (await client.post("/test-log", json={"message": "hello"})).json()
    spans = exporter.get_finished_spans()
    assert [(span.name, span.kind) for span in spans] == [
        ("log_l1", SpanKind.CLIENT),
        ("log_l1", SpanKind.CLIENT),
        ("POST /test-log", SpanKind.SERVER),
    ]
    prompt, event, server = spans
    assert server.resource.attributes["service.name"] == "cos-cc"
    assert server.parent is None
    assert prompt.parent == event.parent == server.context
    assert {format(span.context.trace_id, "032x") for span in spans} == {answer["trace_id"]}
    assert {attributes(span)["request_id"] for span in spans} == {answer["request_id"]}
    assert attributes(server)["layer"] == "api"
    assert attributes(server)["http.response.status_code"] == 200
    assert [attributes(span)["layer"] for span in (prompt, event)] == ["service", "service"]
    assert attributes(prompt)["mem0.record_id"] == answer["prompt_trace_id"]
    assert attributes(prompt)["mem0.event_type"] == "prompt_trace"
    assert attributes(event)["mem0.record_id"] == answer["event_log_id"]
    assert attributes(event)["mem0.event_type"] == "test_log"


async def test_an_event_type_that_logfire_would_take_for_a_secret_is_on_its_span(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await client.post("/test-log", json={"event_type": "session_start"})
    assert attributes(exporter.get_finished_spans()[1])["mem0.event_type"] == "session_start"


async def test_no_more_attributes_than_these_are_on_the_spans_of_a_request(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await client.post("/test-log?token=secret", json={"content": "secret", "secret": "secret"})
    logfires = {"logfire.msg", "logfire.span_type", "request_id"}
    found = [(span.name, set(attributes(span)) - logfires) for span in exporter.get_finished_spans()]
    database = {"db.system.name", "db.operation.name", "db.collection.name", "db.query.text"}
    record = ("log_l1", {"layer", "mem0.event_type", "mem0.record_id", *database})
    http = {"http.request.method", "http.response.status_code", "http.route", "network.protocol.version"}
    url = {"url.scheme", "url.path", "url.query", "server.address", "server.port"}
    assert found == [record, record, ("POST /test-log", {"layer", *http, *url})]
    for span in exporter.get_finished_spans():
        assert "secret" not in span.to_json()


def test_a_query_string_is_in_nothing_that_leaves_the_process(
    receiver: Receiver, database_url: str, tmp_path: Path
) -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "LOGFIRE_TOKEN": "pylf_v1_us_0123456789",
        "LOGFIRE_BASE_URL": receiver.endpoint,
    }
    with running_service(database_url, tmp_path / "log", "--no-access-log", **environment) as service:
        httpx.post(f"{service.url}/test-log?q=secret", json={})
        service.stop()
    servers = [span for span in receiver.spans if span.name == "POST /test-log"]
    assert {span.attributes["logfire.span_type"] for span in servers} >= {"span"}
    assert not [span for span in receiver.spans if "secret" in str(span.proto)]


@pytest.fixture
def failing(app: FastAPI) -> FastAPI:
    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError

    return app


@pytest.mark.parametrize(
    "request_",
    [
        ("POST", "/test-log", b"{}", 200),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/test-log", b"", 405),
        ("POST", "/test-log", b"x" * 1_048_577, 413),
        ("POST", "/test-log", b"[]", 422),
        ("GET", "/fails", b"", 500),
    ],
)
@pytest.mark.parametrize("given", [None, "mine"])
@pytest.mark.usefixtures("failing")
async def test_every_answer_says_the_request_id_exactly_once_and_every_span_has_it(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, request_: tuple[str, str, bytes, int], given: str | None
) -> None:
    method, path, body, status = request_
    headers = {"content-type": "application/json"} | ({"x-request-id": given} if given else {})
    response = await client.request(method, path, content=body, headers=headers)
    assert response.status_code == status
    (request_id,) = response.headers.get_list("x-request-id")
    assert request_id == (given or request_id)
    spans = exporter.get_finished_spans()
    assert len(spans) > 0
    assert {attributes(span).get("request_id") for span in spans} == {request_id}
    assert len([span for span in spans if span.kind is SpanKind.SERVER]) == 1


async def test_what_is_added_to_the_application_later_counts(
    app: FastAPI, client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    class TeapotError(Exception):
        """What only the handler knows of."""

    @app.exception_handler(TeapotError)
    async def teapot(*_: object) -> Response:
        return Response(status_code=418)

    @app.middleware("http")
    async def add_header(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["x-inner"] = request.state.request_id
        return response

    @app.get("/teapot")
    async def brew() -> None:
        raise TeapotError

    response = await client.get("/teapot", headers={"x-request-id": "mine"})
    assert response.status_code == 418
    assert response.headers["x-inner"] == response.headers["x-request-id"] == "mine"
    (server,) = exporter.get_finished_spans()
    assert attributes(server)["request_id"] == "mine"


async def test_an_unreachable_database_is_a_503_that_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(database_url="postgresql://someone:secret@127.0.0.1:1/somewhere"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        response = await client.post("/test-log", json={}, headers={"x-request-id": "mine"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.headers.get_list("x-request-id") == ["mine"]
    answer = response.json()
    assert UUID(answer.pop("record_id")).version == 7
    assert answer == {"detail": "The database is unavailable.", "request_id": "mine", "committed": []}
    assert caplog.messages[-1].startswith("POST /test-log: 503, the database is unavailable (SQLSTATE 08001): nothing")
    assert "secret" not in caplog.text


async def test_a_callers_baggage_and_traceparent_are_not_trusted(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    headers = {"baggage": "request_id=EVIL,layer=EVIL", "traceparent": TRACEPARENT, "tracestate": "evil=EVIL"}
    answer = (await client.post("/test-log", json={}, headers=headers)).json()
    assert answer["trace_id"] != CALLERS_TRACE
    for span in exporter.get_finished_spans():
        assert "EVIL" not in span.to_json()
        assert format(span.context.trace_id, "032x") == answer["trace_id"]


async def test_a_server_without_the_tls_that_is_asked_for_is_an_outage_that_says_so(database_url: str) -> None:
    with counted(database_url) as wire:
        url = wire.url.replace("sslmode=disable", "sslmode=require")
        async with Database(Settings(database_url=url)) as database:
            with pytest.raises(DatabaseUnavailableError, match="SQLSTATE 08004.*does it offer the TLS"):
                await log_l1(database.idle, EventRecord("e", {}))


def test_a_trusted_callers_trace_is_continued(receiver: Receiver, database_url: str, tmp_path: Path) -> None:
    environment = {"CC_DISTRIBUTED_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
    with running_service(database_url, tmp_path / "log", **environment) as service:
        headers = {"traceparent": TRACEPARENT, "baggage": "request_id=EVIL"}
        answer = httpx.post(f"{service.url}/test-log", json={}, headers=headers).json()
        assert service.stop() in (0, -15)
    assert answer["trace_id"] == CALLERS_TRACE
    (server,) = [span for span in receiver.spans if span.name == "POST /test-log"]
    assert server.parent_id == "00f067aa0ba902b7"
    assert server.attributes["request_id"] == answer["request_id"] != "EVIL"


def test_ids_do_not_leak_between_requests_on_one_connection(
    receiver: Receiver, database_url: str, tmp_path: Path
) -> None:
    # OpenTelemetry's own settings change nothing of the one trace that each request is.
    excluded = {"OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": ".*", "OTEL_PYTHON_EXCLUDED_URLS": ".*"}
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, **excluded}
    with (
        running_service(database_url, tmp_path / "log", **environment) as service,
        httpx.Client(base_url=service.url) as client,
    ):
        answers = [
            client.post("/test-log", json={"content": "x" * size}).json() for size in (10, 200_000, 10, 200_000, 10)
        ]
        service.stop()
    assert len({answer["request_id"] for answer in answers}) == len(answers)
    assert len({answer["trace_id"] for answer in answers}) == len(answers)
    for answer in answers:
        spans = [span for span in receiver.spans if span.trace_id == answer["trace_id"]]
        assert len(spans) == 3
        assert {span.attributes["request_id"] for span in spans} == {answer["request_id"]}
        assert [span.parent_id for span in spans if span.name == "POST /test-log"] == [""]


async def test_start_and_end_need_no_database_and_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nothing"))
    gc.unfreeze()
    async with app.router.lifespan_context(app):
        assert gc.get_freeze_count() > 0
    gc.unfreeze()
    assert [record.message for record in caplog.records if record.name == "backend.cc.cc_main"] == []


async def test_spans_that_could_not_be_delivered_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("backend.cc.cc_main.SHUTDOWN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nothing"))
        async with lifespan(app):
            with trace.get_tracer("test").start_as_current_span("undeliverable"):
                pass
        assert "Some spans could not be delivered within 0.1 s." in caplog.messages


async def test_the_debug_route_can_be_left_out(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"cc_debug_routes": False}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        assert (await client.post("/test-log", json={})).status_code == 404
        assert "/test-log" not in (await client.get("/openapi.json")).text


async def test_its_documentation_is_one_page(client: httpx.AsyncClient) -> None:
    for path, status in {"/docs": 200, "/openapi.json": 200, "/redoc": 404, "/docs/oauth2-redirect": 404}.items():
        assert (await client.get(path)).status_code == status


def test_the_services_own_log_lines_of_level_info_are_shown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for name in ("backend", "common"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    create_app(settings)
    assert [logging.getLogger(name).level for name in ("backend", "common")] == [logging.INFO] * 2


async def test_a_body_at_the_limit_is_taken(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"cc_max_body_bytes": 100}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        for size, status in ((100, 200), (101, 413)):
            body = json.dumps({"content": "x" * (size - len('{"content": ""}'))})
            response = await client.post("/test-log", content=body, headers={"content-type": "application/json"})
            assert (len(body), response.status_code) == (size, status)


def test_without_a_database_url_the_error_names_the_variable() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    started = subprocess.run(
        [sys.executable, "-c", "import backend.cc.cc_main"],
        env={**environment, "PYTHONPATH": str(ROOT / "src"), "LOGFIRE_TOKEN": "secret"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode != 0
    assert "database_url\n  Field required" in started.stderr
    assert "secret" not in started.stderr
