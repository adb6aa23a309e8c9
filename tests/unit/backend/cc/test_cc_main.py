import contextlib
import gc
import json
import logging
import socket
import time
import warnings
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from sqlalchemy import text

from backend.cc.cc_main import Service, create_app
from backend.cc.config import Settings
from backend.cc.deps import DBSession
from backend.cc.services.logging import EventRecord, log_l1
from support.clients import TestClient, client_of

CALLERS_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
RECORDS = ["log_l1 prompt_trace", "log_l1 event_log"]
TRACEPARENT = f"00-{CALLERS_TRACE}-00f067aa0ba902b7-01"


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def test_a_request_is_one_whole_trace_with_ids_and_names_and_no_content(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    body = {"content": "secret", "event_type": "session_start", "secret": "secret"}  # Logfire would scrub the type
    answer = (await client.post("/test-log?token=secret", json=body)).json()
    spans = exporter.get_finished_spans()
    prompt, event, server = spans
    assert [(span.name, span.kind) for span in spans] == [
        ("log_l1 prompt_trace", SpanKind.CLIENT),
        ("log_l1 event_log", SpanKind.CLIENT),
        ("POST /test-log", SpanKind.SERVER),
    ]
    assert server.resource.attributes["service.name"] == "cos-cc"
    assert server.parent is None
    assert prompt.parent == event.parent == server.context
    assert {format(span.context.trace_id, "032x") for span in spans} == {answer["trace_id"]}
    assert {attributes(span)["request_id"] for span in spans} == {answer["request_id"]}
    for span, record_id, event_type in (
        (prompt, answer["prompt_trace_id"], "prompt_trace"),
        (event, answer["event_log_id"], "session_start"),
    ):
        assert attributes(span).items() >= {"mem0.record_id": record_id, "mem0.event_type": event_type}.items()
    assert attributes(server).items() >= {"layer": "api", "http.response.status_code": 200}.items()
    logfires = {"logfire.msg", "logfire.span_type", "request_id"}
    http = {"http.request.method", "http.response.status_code", "http.route", "network.protocol.version"}
    url = {"url.scheme", "url.path", "url.query", "server.address", "server.port"}
    assert attributes(server).keys() == {"layer", *logfires, *http, *url}
    assert "secret" not in "".join(span.to_json() for span in spans)


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


async def test_a_callers_baggage_and_traceparent_are_not_trusted(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    headers = {"baggage": "request_id=EVIL,layer=EVIL", "traceparent": TRACEPARENT, "tracestate": "evil=EVIL"}
    answer = (await client.post("/test-log", json={}, headers=headers)).json()
    assert answer["trace_id"] != CALLERS_TRACE
    for span in exporter.get_finished_spans():
        assert "EVIL" not in span.to_json()
        assert format(span.context.trace_id, "032x") == answer["trace_id"]


async def test_a_trusted_callers_trace_is_continued_and_its_baggage_is_not(
    settings: Settings, exporter: InMemorySpanExporter
) -> None:
    trusting = settings.model_copy(update={"cc_distributed_tracing": True})
    async with client_of(create_app(trusting, span_processors=[SimpleSpanProcessor(exporter)])) as client:
        headers = {"traceparent": TRACEPARENT, "baggage": "request_id=EVIL"}
        answer = (await client.post("/test-log", json={}, headers=headers)).json()
    assert answer["trace_id"] == CALLERS_TRACE
    server = exporter.get_finished_spans()[-1]
    assert server.parent is not None
    assert format(server.parent.span_id, "016x") == "00f067aa0ba902b7"
    assert attributes(server)["request_id"] == answer["request_id"] != "EVIL"


async def test_a_service_that_is_mounted_in_an_application_without_telemetry_is_traced(
    app: Service, exporter: InMemorySpanExporter
) -> None:
    outer = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})
    outer.mount("/cc", app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://cc") as client:
        trace_id = (await client.post("/cc/test-log", json={})).json()["trace_id"]
    assert {format(span.context.trace_id, "032x") for span in exporter.get_finished_spans()} == {trace_id}


# Start and end


async def test_start_and_end_need_no_database_and_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nothing"))
    gc.unfreeze()
    async with app.router.lifespan_context(app):
        assert gc.get_freeze_count() > 0
    gc.unfreeze()
    assert [record.message for record in caplog.records if record.name == "backend.cc.cc_main"] == []


def test_a_lifespan_of_your_own_runs_inside_the_services_and_its_state_reaches_requests(settings: Settings) -> None:
    ids = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Service) -> AsyncIterator[dict[str, int]]:
        async with app.database.session() as session:
            ids.append(await log_l1(session, EventRecord("started", {})))
            yield {"x": 1}
            ids.append(await log_l1(session, EventRecord("ended", {})))

    app = create_app(settings, lifespan=lifespan)

    @app.get("/x")
    async def x(request: Request) -> tuple[int, str]:
        return request.state.x, request.state.request_id

    with TestClient(app) as client:
        assert client.get("/x", headers={"x-request-id": "mine"}).json() == [1, "mine"]
        assert len(ids) == 1
    assert len(ids) == 2


def test_an_application_that_has_ended_can_start_again_in_another_loop_and_is_traced(
    app: Service, exporter: InMemorySpanExporter
) -> None:
    for _ in range(2):
        with TestClient(app) as client:
            assert client.post("/test-log", json={}).status_code == 200
        assert [span.name for span in exporter.get_finished_spans()] == [*RECORDS, "POST /test-log"]
        exporter.clear()


def test_without_a_lifespan_each_request_may_have_an_event_loop_of_its_own(
    app: Service, exporter: InMemorySpanExporter
) -> None:
    @app.post("/query")
    async def query(session: DBSession) -> None:
        await session.execute(text("SELECT 1"))

    client = TestClient(app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nobody has closed the connections of a loop that has ended
        for _ in range(2):
            assert client.post("/test-log", json={}).status_code == 200
            assert client.post("/query").status_code == 200
        with client:
            assert client.post("/test-log", json={}).status_code == 200
        gc.unfreeze()  # otherwise a later test would collect them
        gc.collect()
    assert len(exporter.get_finished_spans()) == 3 * 3 + 2


async def test_spans_that_could_not_be_delivered_are_spoken_of_and_delay_the_end_no_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("backend.cc.cc_main.SHUTDOWN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nothing"))
        async with app.router.lifespan_context(app):
            with trace.get_tracer("test").start_as_current_span("undeliverable"):
                pass
            ended = time.monotonic()
        assert time.monotonic() - ended < 0.9
        assert "Some spans could not be delivered within 0.1 s." in caplog.messages


# What is there, and what is not


async def test_the_debug_route_can_be_left_out(settings: Settings) -> None:
    async with client_of(create_app(settings.model_copy(update={"cc_debug_routes": False}))) as client:
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
    async with client_of(create_app(settings.model_copy(update={"cc_max_body_bytes": 100}))) as client:
        for size, status in ((100, 200), (101, 413)):
            body = json.dumps({"content": "x" * (size - len('{"content": ""}'))})
            response = await client.post("/test-log", content=body, headers={"content-type": "application/json"})
            assert (len(body), response.status_code) == (size, status)
