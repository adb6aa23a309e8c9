import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import logfire
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from pydantic import BaseModel

from common import logger_logfire
from common.logger_logfire import configure_logfire, flush_logfire
from common.request_id_middleware import request_id_var
from devtools.otlp import Receiver, otlp_receiver
from devtools.ports import free_port

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


def spanned(name: str = "hello", **options: Any) -> trace.Span:
    """Return a span that has ended."""
    span = trace.get_tracer("test").start_span(name, **options)
    span.end()
    return span


def test_without_a_token_one_warning_names_the_variable_and_ids_alone_are_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure_logfire("cos-cc")
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "LOGFIRE_TOKEN" in warning.message
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


def test_an_otlp_endpoint_receives_spans_of_the_named_service_and_no_metrics(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    configure_logfire("cos-cc", environment="staging", otlp=True)
    spanned()
    assert flush_logfire(timeout=10)
    logfire.metric_counter("requests").add(1)
    logfire.force_flush()
    assert receiver.requests == 1
    (span,) = receiver.spans
    assert span.resource["service.name"] == "cos-cc"
    assert span.resource["deployment.environment.name"] == "staging"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_spans_are_batched_for_a_service_under_load_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, queue = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_BSP_MAX_QUEUE_SIZE"
    monkeypatch.delenv(batch, raising=False)
    monkeypatch.setenv(queue, "1000")
    configure_logfire("cos-cc")
    assert (os.environ[batch], os.environ[queue]) == ("128", "1000")
    monkeypatch.delenv(queue)
    configure_logfire("cos-cc")
    assert os.environ[queue] == "8192"


@pytest.fixture
def logfire_endpoint(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    monkeypatch.setenv("LOGFIRE_BASE_URL", receiver.endpoint)
    # Each span is sent by itself. Of one batch, Logfire's exporter would drop the span that says that another started.
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    return receiver


def sent(receiver: Receiver) -> set[tuple[str, str]]:
    logfire.force_flush()
    return {(span.name, span.attributes["logfire.span_type"]) for span in receiver.spans}


def in_database() -> AbstractContextManager[trace.Span]:
    attributes = {"db.system.name": "postgresql"}
    return trace.get_tracer("test").start_as_current_span("INSERT", kind=SpanKind.CLIENT, attributes=attributes)


def in_request() -> AbstractContextManager[trace.Span]:
    return trace.get_tracer("test").start_as_current_span("POST", kind=SpanKind.SERVER)


def test_a_request_that_only_calls_the_database_is_sent_once_when_it_is_over(logfire_endpoint: Receiver) -> None:
    configure_logfire("cos-cc", token=TOKEN)
    with in_request():
        with in_database():
            pass
        assert sent(logfire_endpoint) == set()
    assert sent(logfire_endpoint) == {("POST", "span"), ("INSERT", "span")}
    with in_database():
        assert len(logfire_endpoint.spans) == 2
    sent(logfire_endpoint)
    assert len(logfire_endpoint.spans) == 3


def test_work_of_the_codes_own_is_seen_in_logfire_while_it_runs(logfire_endpoint: Receiver) -> None:
    configure_logfire("cos-cc", token=TOKEN)
    with in_request():
        with in_database():
            pass
        with logfire.span("model call"):
            pending = {("POST", "pending_span"), ("model call", "pending_span")}
            assert sent(logfire_endpoint) == pending | {("INSERT", "span")}


def test_a_request_that_takes_long_is_seen_in_logfire_while_it_runs(
    logfire_endpoint: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logfire("cos-cc", token=TOKEN)
    with in_request():
        monkeypatch.setattr(logger_logfire, "LIVE_SECONDS", 0)
        with in_database():
            assert sent(logfire_endpoint) == {("POST", "pending_span"), ("INSERT", "pending_span")}


@pytest.mark.parametrize("token", [None, TOKEN])
def test_the_sample_rate_is_the_operators(
    logfire_endpoint: Receiver, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", logfire_endpoint.endpoint)
    configure_logfire("cos-cc", token=token, otlp=True, sample_rate=0)
    assert spanned().get_span_context().is_valid
    assert sent(logfire_endpoint) == set()


def recorded() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    processors = [SimpleSpanProcessor(exporter)]
    configure_logfire("cos-cc", unscrubbed=["mem0.event_type"], span_processors=processors)
    return exporter


def test_every_span_carries_the_request_id_of_its_context_unless_it_has_its_own() -> None:
    exporter = recorded()
    token = request_id_var.set("req-1")
    with logfire.span("inner"):
        spanned("other", attributes={"request_id": "of-another-one"})
    request_id_var.reset(token)
    spanned("outside")
    ids = {span.name: (span.attributes or {}).get("request_id") for span in exporter.get_finished_spans()}
    assert ids == {"inner": "req-1", "other": "of-another-one", "outside": None}


def test_our_ids_and_names_are_not_scrubbed_and_others_are() -> None:
    exporter = recorded()
    attributes = {"mem0.event_type": "session_start", "request_id": "auth-svc-42", "note": "my password is x"}
    spanned(attributes=attributes)
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["mem0.event_type"] == "session_start"
    assert span.attributes["request_id"] == "auth-svc-42"
    assert span.attributes["note"] == "[Scrubbed due to 'password']"


def test_what_the_code_did_not_set_is_on_no_span() -> None:
    exporter = recorded()
    variable = "a name"
    with logfire.set_baggage(carried="along"):
        logfire.info(f"hello {variable}")
    (span,) = exporter.get_finished_spans()
    assert not (span.attributes or {}).keys() & {"variable", "carried"}


def test_the_console_prints_a_span_when_it_starts_if_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    exporter = recorded()
    logfire.info("unseen\n")
    assert capsys.readouterr().out == ""
    configure_logfire("cos-cc", console=True)
    with in_request(), in_database():
        assert "INSERT" in capsys.readouterr().out
    (span,) = exporter.get_finished_spans()
    assert (span.attributes or {})["logfire.msg"] == "unseen\n"


def test_no_text_of_a_callers_looks_like_another_line_on_the_console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGFIRE_CONSOLE_VERBOSE", "true")
    configure_logfire("cos-cc", console=True)
    forged = "\nWARNING:  x\x1b[2J\r\u2028"
    attributes: dict[str, str | int] = {"http.request.method": "GET", "url.path": f"/{forged}"}
    attributes["http.response.status_code"] = 404
    spanned("GET", kind=SpanKind.SERVER, attributes=attributes)
    spanned("log_l1", attributes={"logfire.msg": f"log_l1 {forged}"})
    with logfire.span(f"asked {{text}} {forged}", text=forged):
        logfire.warn("again {text}", text=forged)
    lines = capsys.readouterr().out.split("\n")
    escaped = r"\nWARNING:  x\x1b[2J\r\u2028"
    for text in (f" GET /{escaped}", f" log_l1 {escaped}", f" again {escaped}"):
        assert len([line for line in lines if line.endswith(text)]) == 1
    assert not [line for line in lines if line.startswith("WARNING") or set("\x1b\r\u2028") & set(line)]
    assert caplog.messages[-1] == f"GET /{escaped}: 404"


def test_neither_a_callers_header_nor_a_key_is_repeated_in_a_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("opentelemetry.trace.span", "opentelemetry.trace.propagation", "opentelemetry.util.re")
    for name in names:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    # An endpoint's path may be a key, too.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}/secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key: secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5")
    configure_logfire("cos-cc", otlp=True)
    logfire.info("hello")
    assert flush_logfire(timeout=10)
    assert [logging.getLogger(name).level for name in names] == [logging.ERROR] * 3
    assert "Transient error ConnectionError encountered" in caplog.text
    assert "secret" not in caplog.text


class Question(BaseModel):
    number: int


def test_an_exceptions_text_stays_off_the_span_and_its_type_and_frames_stay_on() -> None:
    exporter = recorded()
    secret = "a prompt nobody may read"
    with suppress(RuntimeError), logfire.span("raised"):
        try:
            raise LookupError(secret)
        except LookupError as error:
            raise RuntimeError(secret) from error
    with suppress(ValueError), logfire.span("refused"):
        Question.model_validate({"number": secret})
    with logfire.span("handled") as span:
        span.record_exception(KeyError(secret))
    raised, refused, handled = exporter.get_finished_spans()
    assert secret not in raised.to_json() + refused.to_json() + handled.to_json()
    assert [span.status.status_code.name for span in (raised, refused, handled)] == ["ERROR", "ERROR", "UNSET"]
    event = dict(raised.events[0].attributes or {})
    stacktrace = str(event.pop("exception.stacktrace"))
    assert event == {"exception.type": "RuntimeError", "exception.message": "", "exception.escaped": "True"}
    assert stacktrace.startswith('  File "')
    assert stacktrace.endswith("from error\nRuntimeError")
    assert stacktrace.count('  File "') == 1
    assert raised.status.description == "RuntimeError"


def test_a_process_that_runs_another_opentelemetry_sdk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", TracerProvider)
    with pytest.raises(RuntimeError, match="start without opentelemetry-instrument"):
        configure_logfire("cos-cc")


@pytest.mark.parametrize(("status", "lines"), [(200, 0), (399, 0), (400, 1), (499, 1), (500, 0), (None, 0)])
def test_the_console_is_followed_by_the_status_of_a_refused_request(
    caplog: pytest.LogCaptureFixture, status: int | None, lines: int
) -> None:
    configure_logfire("cos-cc", console=True)
    caplog.clear()
    attributes = {} if status is None else {"http.response.status_code": status}
    spanned("GET /", kind=SpanKind.SERVER, attributes=attributes)
    spanned("call", kind=SpanKind.CLIENT, attributes=attributes)
    assert caplog.messages == [f"GET /: {status}"] * lines
