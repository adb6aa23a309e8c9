"""Start tracing: Logfire, any OTLP backend, or ids alone."""

import atexit
import logging
import os
import threading
import traceback
from collections.abc import Sequence
from typing import Any, Final

import logfire
from fastapi import FastAPI
from logfire.types import ExceptionCallbackHelper
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation import asgi
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Span as ApiSpan
from opentelemetry.trace import SpanKind, Status
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from common.request_id_middleware import request_id_var

logger = logging.getLogger(__name__)

_OWN_ATTRIBUTES: Final = frozenset({"request_id", "layer", "mem0.event_type", "mem0.record_id"})
"""Attributes that hold ids and names, never content. Scrubbing goes by words, and would turn an
event type `session_start` or a request id `auth-svc-42` into "[Scrubbed due to ...]"."""

_DATABASE_ADDRESS: Final = frozenset(
    {
        "db.user",
        "net.peer.name",
        "net.peer.port",
        "network.peer.address",
        "network.peer.port",
        "server.address",
        "server.port",
    }
)
"""Attributes of an SQL span that say where the database is, in the old and the new semantic conventions."""

_BATCHES: Final = {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "128", "OTEL_BSP_MAX_QUEUE_SIZE": "8192"}
"""How spans are batched, unless the operator says otherwise. Logfire makes the batch processors, and they read
their sizes from the environment only. A batch is encoded in Python, in competition with the event loop: at the SDK's
512 spans requests wait 20 ms for it, and their p99 is 3.5 times the median, at 128 2 times. The SDK's queue of 2,048
spans lasts half a second under full load, before spans are dropped."""


class RequestIDSpanProcessor(SpanProcessor):
    """Put the request id on every span that starts while a request is served.

    A processor that reads the context variable, not OpenTelemetry baggage: a caller can send a
    `baggage` header, and with it would choose what our spans say.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if request_id := request_id_var.get():
            span.set_attribute("request_id", request_id)


class RedactingSpanProcessor(SpanProcessor):
    """Take off a span what its instrumentation puts there unasked.

    Query strings, where callers leave tokens, and where the database is: when the span starts, since
    Logfire sends it then already. The text of an exception, in the status description, when it ends:
    text is content, PostgreSQL's repeats the row that it refused, pydantic's the input.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        attributes = span.attributes or {}
        if span.kind is SpanKind.SERVER:
            _cut_query(span)
        elif "db.system" in attributes or "db.system.name" in attributes:
            for name in _DATABASE_ADDRESS.intersection(attributes):
                span.set_attribute(name, "")

    def on_end(self, span: ReadableSpan) -> None:
        if span.status.description:
            # A span that has ended has no setter. This is Logfire's copy of it, made for the exporters.
            span._status = Status(span.status.status_code, span.status.description.partition(":")[0])  # noqa: SLF001


def configure_logfire(
    service_name: str,
    *,
    token: str | None = None,
    environment: str | None = None,
    otlp: bool = False,
    console: bool = False,
    trace_sql: bool = True,
    distributed_tracing: bool = False,
    span_processors: Sequence[SpanProcessor] = (),
) -> None:
    """Start tracing for this process. Safe without a token, and before any of it is reachable.

    Where spans have nowhere to go they are not recorded: trace and span ids are made all the same,
    at a fraction of the price.

    Args:
        service_name: The OpenTelemetry `service.name`, 1 character or more.
        token: Logfire's write token, or None to send nothing there.
        environment: The OpenTelemetry `deployment.environment.name`, or None to leave it out.
        otlp: Whether `OTEL_EXPORTER_OTLP_ENDPOINT` or its traces variant is set. The SDK reads the
            variables by itself; this says that somebody is listening.
        console: Whether to print spans to standard output too; `LOGFIRE_CONSOLE_*` say how.
        trace_sql: Whether SQL statements are spans of their own, without their parameters.
        distributed_tracing: Whether to continue the trace that a caller's `traceparent` names.
            Only for callers that are trusted: anyone else could write into their traces, or ours.
        span_processors: More OpenTelemetry span processors, e.g. a test's exporter.
    """
    recording = bool(token or otlp or console or span_processors)
    if not recording:
        logger.warning(
            "Neither LOGFIRE_TOKEN nor OTEL_EXPORTER_OTLP_ENDPOINT is set: tracing is off. "
            "Request and trace ids are still made."
        )
    elif not token:
        logger.info("LOGFIRE_TOKEN is not set: nothing is sent to Logfire.")

    for name, value in _BATCHES.items():
        os.environ.setdefault(name, value)
    # Trace context alone. The default reads `baggage` too, which we use nothing of. The parsers of both write warnings
    # with the caller's text into our log; that of `tracestate` also where the trace is not continued.
    propagate.set_global_textmap(TraceContextTextMapPropagator())
    for name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logfire.configure(
        service_name=service_name,
        environment=environment,
        token=token,
        # False, not "if-token-present": a forgotten `.logfire` folder would count as a token.
        send_to_logfire=bool(token),
        console=None if console else False,
        # None: LOGFIRE_TRACE_SAMPLE_RATE decides.
        sampling=None if recording else logfire.SamplingOptions(head=ALWAYS_OFF),
        # Nobody asked for metrics, and they are an eighth of a traced request's CPU time.
        metrics=False,
        # Both would put on spans what nobody has put there: an f-string's variables, baggage.
        inspect_arguments=False,
        add_baggage_to_attributes=False,
        distributed_tracing=distributed_tracing,
        scrubbing=logfire.ScrubbingOptions(
            callback=_keep_own_attributes,
            # The input that failed pydantic's validation, as JSON.
            extra_patterns=[r"exception\.logfire\.data"],
        ),
        advanced=logfire.AdvancedOptions(exception_callback=_drop_exception_text),
        additional_span_processors=[RequestIDSpanProcessor(), RedactingSpanProcessor(), *span_processors],
    )
    _instrument_asyncpg(on=recording and trace_sql)


def instrument_fastapi(app: FastAPI) -> None:
    """Give every request to `app` a server span with `layer=api`, and let no user content on it.

    Args:
        app: The application, before its middleware stack is built.
    """
    # What `logfire.instrument_fastapi` is built on, without what that adds: the parsed arguments, prompts
    # included, and when they were parsed, for a tenth of the request's CPU time.
    # Its decoder takes a header that is not UTF-8 for Python source with escapes, and a broken one is a 500.
    asgi._decode_header_item = lambda value: value.decode("utf-8", "replace")  # noqa: SLF001
    FastAPIInstrumentor.instrument_app(
        app, server_request_hook=_describe_server_span, exclude_spans=["receive", "send"]
    )


def flush_logfire(timeout: float) -> bool:
    """Deliver the spans that have ended but wait for their batch. Blocks; call it in a thread.

    Args:
        timeout: How long to wait, in seconds, 0 or more. The SDK's own timeouts are not kept where an
            endpoint accepts a connection and never answers.

    Returns:
        Whether everything was handed over in time.
    """
    thread = threading.Thread(target=logfire.force_flush, name="flush_logfire", daemon=True)
    thread.start()
    thread.join(timeout)
    delivered = not thread.is_alive()
    if not delivered:
        # Given up. The SDK would begin again when the interpreter exits, and hold it for half a minute.
        provider: Any = trace.get_tracer_provider()  # Logfire's, around the SDK's
        atexit.unregister(provider.provider.shutdown)
    return delivered


def _instrument_asyncpg(*, on: bool) -> None:
    # asyncpg, not SQLAlchemy: the OpenTelemetry instrumentation of SQLAlchemy emits nothing on 2.1.
    instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]
    if on and not instrumentor.is_instrumented_by_opentelemetry:
        logfire.instrument_asyncpg(capture_parameters=False)
    elif not on and instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


def _keep_own_attributes(match: logfire.ScrubMatch) -> Any:
    return match.value if match.path[-1] in _OWN_ATTRIBUTES else None


def _drop_exception_text(helper: ExceptionCallbackHelper) -> None:
    helper.event_attributes["exception.message"] = ""
    frames = traceback.format_tb(helper.exception.__traceback__)
    helper.event_attributes["exception.stacktrace"] = "".join(frames) + type(helper.exception).__qualname__


def _describe_server_span(span: ApiSpan, scope: Scope) -> None:
    span.set_attribute("layer", "api")
    if scope.get("query_string"):
        _cut_query(span)  # again: the instrumentation sets its attributes a second time


def _cut_query(span: ApiSpan) -> None:
    # Query strings are where callers leave tokens. The path stays.
    attributes = getattr(span, "attributes", None) or {}
    if "?" in (url := attributes.get("http.url", "")):
        span.set_attribute("http.url", url.partition("?")[0])
    if "url.query" in attributes:  # the name in the new semantic conventions
        span.set_attribute("url.query", "")
