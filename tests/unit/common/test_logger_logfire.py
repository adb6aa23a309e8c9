import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import asyncpg
import logfire
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel

from common.logger_logfire import configure_logfire, flush_logfire
from common.request_id_middleware import request_id_var
from devtools.otlp import ReceivedSpan, Receiver, otlp_receiver

TOKEN = "pylf_v1_us_0123456789"


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    configure_logfire("cos-cc")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as receiver:
        yield receiver
        # Before it is closed: what is left in the queue goes out now and not into a retry.
        configure_logfire("cos-cc")


def test_without_a_token_one_warning_names_the_variable(caplog: pytest.LogCaptureFixture) -> None:
    configure_logfire("cos-cc")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "LOGFIRE_TOKEN" in warnings[0].message


def test_without_a_token_ids_are_made_and_nothing_is_recorded() -> None:
    configure_logfire("cos-cc")
    with trace.get_tracer("test").start_as_current_span("span") as span:
        assert span.get_span_context().is_valid
        assert not span.is_recording()


def test_a_forgotten_credentials_folder_is_no_token(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("credentials")
    (home / "logfire_credentials.json").write_text(
        f'{{"token": "{TOKEN}", "project_name": "p", "project_url": "u", "logfire_api_url": "{receiver.endpoint}"}}'
    )
    monkeypatch.setenv("LOGFIRE_CREDENTIALS_DIR", str(home))
    configure_logfire("cos-cc", span_processors=[SimpleSpanProcessor(InMemorySpanExporter())])
    logfire.info("hello")
    logfire.force_flush()
    assert receiver.requests == 0


def spans_named(receiver: Receiver, name: str) -> list[ReceivedSpan]:
    assert flush_logfire(timeout=10)
    return [span for span in receiver.spans if span.name == name]


def test_an_otlp_endpoint_receives_spans_of_the_named_service(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    configure_logfire("cos-cc", environment="staging", otlp=True)
    with trace.get_tracer("test").start_as_current_span("hello"):
        pass
    (span,) = spans_named(receiver, "hello")
    assert span.resource["service.name"] == "cos-cc"
    assert span.resource["deployment.environment.name"] == "staging"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_with_a_token_logfire_receives_spans_at_its_base_url(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGFIRE_BASE_URL", receiver.endpoint)
    configure_logfire("cos-cc", token=TOKEN)
    with trace.get_tracer("test").start_as_current_span("hello"):
        pass
    assert len(spans_named(receiver, "hello")) == 1


def test_the_sample_rate_is_the_operators(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setenv("LOGFIRE_TRACE_SAMPLE_RATE", "0")
    configure_logfire("cos-cc", otlp=True)
    with trace.get_tracer("test").start_as_current_span("hello") as span:
        assert span.get_span_context().is_valid
    assert spans_named(receiver, "hello") == []


def recorded(*, trace_sql: bool = True) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    configure_logfire("cos-cc", span_processors=[SimpleSpanProcessor(exporter)], trace_sql=trace_sql)
    return exporter


def test_every_span_carries_the_request_id_of_its_context() -> None:
    exporter = recorded()
    token = request_id_var.set("req-1")
    with trace.get_tracer("test").start_as_current_span("outer"), logfire.span("inner"):
        pass
    request_id_var.reset(token)
    with trace.get_tracer("test").start_as_current_span("outside"):
        pass
    ids = {span.name: (span.attributes or {}).get("request_id") for span in exporter.get_finished_spans()}
    assert ids == {"outer": "req-1", "inner": "req-1", "outside": None}


def test_our_ids_and_names_are_not_scrubbed_and_others_are() -> None:
    exporter = recorded()
    attributes = {"mem0.event_type": "session_start", "request_id": "auth-svc-42", "note": "my password is x"}
    with trace.get_tracer("test").start_as_current_span("span", attributes=attributes):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["mem0.event_type"] == "session_start"
    assert span.attributes["request_id"] == "auth-svc-42"
    assert span.attributes["note"] == "[Scrubbed due to 'password']"


class Question(BaseModel):
    number: int


@pytest.mark.parametrize("content", ["a prompt nobody may read"])
def test_an_exceptions_text_stays_off_the_span_and_its_type_and_frames_stay_on(content: str) -> None:
    exporter = recorded()
    tracer = trace.get_tracer("test")
    with suppress(RuntimeError), tracer.start_as_current_span("raised"):
        try:
            raise LookupError(content)
        except LookupError as error:
            raise RuntimeError(content) from error
    with suppress(ValueError), tracer.start_as_current_span("refused"):
        Question.model_validate({"number": content})
    with suppress(ValueError), logfire.span("refused again"):
        Question.model_validate({"number": content})
    for span in exporter.get_finished_spans():
        assert content not in span.to_json()
        assert not span.status.is_ok
    raised = exporter.get_finished_spans()[0]
    event = raised.events[0].attributes
    assert event is not None
    assert event["exception.type"] == "RuntimeError"
    assert "test_logger_logfire.py" in str(event["exception.stacktrace"])
    assert raised.status.description == "RuntimeError"


async def test_sql_statements_are_spans_without_their_parameters(database_url: str) -> None:
    exporter = recorded()
    await _query(database_url)
    (span,) = [span for span in exporter.get_finished_spans() if span.name == "SELECT"]
    assert span.attributes is not None
    assert span.attributes["db.statement"] == "SELECT $1::text"
    assert "secret parameter" not in span.to_json()


async def test_sql_spans_can_be_turned_off_and_on_again(database_url: str) -> None:
    exporter = recorded(trace_sql=False)
    await _query(database_url)
    assert exporter.get_finished_spans() == ()
    exporter = recorded(trace_sql=True)
    await _query(database_url)
    assert len(exporter.get_finished_spans()) > 0


async def _query(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("SELECT $1::text", "secret parameter") == "secret parameter"
    await connection.close()


def test_flushing_gives_up_in_time_where_the_endpoint_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        # The exporter's own timeout ends the thread that is given up, when the test is over.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        configure_logfire("cos-cc", otlp=True)
        with trace.get_tracer("test").start_as_current_span("hello"):
            pass
        started = time.monotonic()
        assert not flush_logfire(timeout=0.2)
        assert time.monotonic() - started < 0.9


def test_metrics_are_not_exported(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    configure_logfire("cos-cc", otlp=True)
    logfire.metric_counter("requests").add(1)
    logfire.force_flush()
    assert receiver.requests == 0


async def test_where_the_database_is_stays_off_its_spans(database_url: str) -> None:
    exporter = recorded()
    await _query(database_url)
    for span in exporter.get_finished_spans():
        assert (span.attributes or {})["db.system"] == "postgresql"
        for name in ("db.user", "net.peer.name"):
            assert (span.attributes or {})[name] == ""


@pytest.mark.parametrize(
    ("name", "left"), [("http.url", "http://cc/test-log"), ("url.query", "")], ids=["old names", "new names"]
)
def test_a_query_string_is_off_the_span_when_it_starts(name: str, left: str) -> None:
    recorded()
    value = "http://cc/test-log?q=secret" if name == "http.url" else "q=secret"
    span = trace.get_tracer("test").start_span("GET /", kind=trace.SpanKind.SERVER, attributes={name: value})
    assert isinstance(span, ReadableSpan)
    assert (span.attributes or {})[name] == left
    span.end()
