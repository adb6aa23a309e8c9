"""Start tracing (Logfire, any OTLP backend, or ids alone), and deliver what waits when a service ends."""

import atexit
import logging
import os
import sys
import threading
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, Final, cast

import logfire
from logfire.sampling import SamplingOptions, TailSamplingSpanInfo
from logfire.types import ExceptionCallbackHelper
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import ValidationError

from common.log_lines import printable
from common.request_id_middleware import request_id_var

LIVE_SECONDS: Final = 1.0  # a trace that takes longer is sent to Logfire before it is over
logger = logging.getLogger(__name__)


@dataclass
class RequestSpanProcessor(SpanProcessor):
    """Put the request id on every span of a request, and `layer=api` on its server span."""

    console: bool = False  # whether spans are printed

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        present = span.attributes or {}
        if "request_id" not in present and (request_id := request_id_var.get()):
            span.set_attribute("request_id", request_id)
        if span.kind is SpanKind.SERVER:
            span.set_attribute("layer", "api")
            if "url.query" in present:  # callers leave tokens in query strings
                span.set_attribute("url.query", "")
        if self.console:
            for name in ("logfire.msg", "url.path"):  # what a caller chose could look like another line
                if isinstance(text := present.get(name), str) and not text.isprintable():
                    span.set_attribute(name, printable(text))

    def on_end(self, span: ReadableSpan) -> None:
        if self.console and span.kind is SpanKind.SERVER:  # Logfire prints no status
            attributes = span.attributes or {}
            status = attributes.get("http.response.status_code")
            if isinstance(status, int) and 400 <= status < 500:  # noqa: PLR2004 - HTTP's client errors
                logger.warning("%s: %s", attributes.get("logfire.msg", span.name), status)


def configure_logfire(
    service_name: str,
    *,
    token: str | None = None,
    environment: str | None = None,
    otlp: bool = False,
    console: bool = False,
    distributed_tracing: bool = False,
    sample_rate: float = 1.0,
    unscrubbed: Collection[str] = (),
    span_processors: Sequence[SpanProcessor] = (),
) -> None:
    """Start tracing for this process. If spans have nowhere to go, only trace and span ids are made.

    Args:
        service_name: The OpenTelemetry `service.name`, 1 character or more.
        token: Logfire's write token, or None to send nothing there.
        environment: The OpenTelemetry `deployment.environment.name`, or None to leave it out.
        otlp: Whether an `OTEL_EXPORTER_OTLP_*ENDPOINT` is set. The SDK reads the variable by itself.
        console: Whether to print spans to standard output too; `LOGFIRE_CONSOLE_*` say how.
        distributed_tracing: Whether to continue a caller's trace. For trusted callers only: they choose the trace id.
        sample_rate: The share of traces that are recorded, 0 to 1.
        unscrubbed: Span attributes with names, never content. Logfire would take a name `session_start` for a secret.
        span_processors: More OpenTelemetry span processors, e.g. a test's exporter.

    Raises:
        RuntimeError: Another OpenTelemetry SDK runs in this process. Its spans have query strings and no request id.
    """
    if isinstance(trace.get_tracer_provider(), TracerProvider):  # of which Logfire's is no subclass
        raise RuntimeError("another OpenTelemetry SDK runs in this process: start without opentelemetry-instrument")
    if not (token or otlp or console or span_processors):
        sample_rate = 0.0
        logger.warning("No LOGFIRE_TOKEN, no OTEL_EXPORTER_OTLP_ENDPOINT: tracing is off. Ids are still made.")
    kept = {"request_id", "layer", *unscrubbed}
    # How spans are batched unless the operator says otherwise (docs/decisions/0004).
    os.environ.setdefault("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "128")
    os.environ.setdefault("OTEL_BSP_MAX_QUEUE_SIZE", "8192")
    # Trace context alone, because nothing here reads baggage.
    propagate.set_global_textmap(TraceContextTextMapPropagator())
    # The first two would print text of a caller's header, the third a key in OTEL_EXPORTER_OTLP_HEADERS.
    for name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation", "opentelemetry.util.re"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(OTLPSpanExporter.__module__).addFilter(_drop_error_text)
    if console and isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe or a file would show the spans at the end
    logfire.configure(
        service_name=service_name,
        environment=environment,
        token=token,
        send_to_logfire=bool(token),  # not "if-token-present": a forgotten `.logfire` folder would count as a token
        console=None if console else False,
        sampling=SamplingOptions(sample_rate, _is_shown if token and not console else None),
        metrics=False,  # an eighth of a traced request's CPU time
        # Both add attributes that the code did not set: the variables of an f-string, and the caller's baggage.
        inspect_arguments=False,
        add_baggage_to_attributes=False,
        distributed_tracing=distributed_tracing,
        scrubbing=logfire.ScrubbingOptions(lambda match: match.value if match.path[-1] in kept else None),
        advanced=logfire.AdvancedOptions(exception_callback=_drop_exception_text),
        additional_span_processors=[RequestSpanProcessor(console), *span_processors],
    )


def flush_logfire(timeout: float) -> bool:
    """Deliver the spans that wait. Return whether that took less than `timeout` seconds. Blocks; tracing goes on."""
    # In a thread, because the SDK's own limit fails if the receiver hangs; and not through Logfire's provider, which
    # would hold a lock that the next start of tracing needs.
    provider = cast("Any", trace.get_tracer_provider()).provider
    thread = threading.Thread(target=provider.force_flush, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():  # The SDK's exit handler would wait for the receiver once more.
        atexit.unregister(provider.shutdown)
    return not thread.is_alive()


def _drop_error_text(record: logging.LogRecord) -> bool:
    # The text of an HTTP client's error has the endpoint's path or a header, and either may be a key.
    record.args = tuple(type(arg).__qualname__ if isinstance(arg, Exception) else arg for arg in record.args or ())
    return True


def _is_shown(info: TailSamplingSpanInfo) -> float:
    # For its live view Logfire processes each span twice. That is for work that takes a while, so a trace waits here
    # until it has a span of more than a request and its database calls, lasts LIVE_SECONDS, or is over.
    is_brief = info.span.kind is SpanKind.SERVER or "db.system.name" in (info.span.attributes or {})
    is_over = info.event == "end" and info.span.parent is None
    return float(is_over or not is_brief or info.duration > LIVE_SECONDS)


def _drop_exception_text(helper: ExceptionCallbackHelper) -> None:
    # The text of an exception is content: PostgreSQL's repeats the refused row, pydantic's repeats the input.
    name = type(helper.exception).__qualname__
    frames = traceback.format_tb(helper.exception.__traceback__)
    helper.event_attributes |= {"exception.message": "", "exception.stacktrace": "".join(frames) + name}
    if helper.span.status.status_code is StatusCode.ERROR:  # Logfire has just put the text into the description
        helper.span.set_status(StatusCode.ERROR, name)
    if isinstance(helper.exception, ValidationError):  # Logfire would add the input, as JSON
        helper.no_record_exception()
        helper.span.record_exception(helper.exception, attributes=helper.event_attributes)
