"""Receive OTLP traces over HTTP and keep what arrives: the other end of the exporter, for tests and measurements.

`PYTHONPATH=scripts python -m devtools.otlp` runs one until it is stopped, and prints its address first.
"""

import gzip
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanProto


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived. Ids are hexadecimal, times nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    proto: SpanProto = field(repr=False)


def decode(body: bytes) -> list[ReceivedSpan]:
    """Return the spans of one export request.

    Args:
        body: An `ExportTraceServiceRequest`, not compressed.
    """
    request = ExportTraceServiceRequest.FromString(body)
    return [
        ReceivedSpan(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.kind,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            _attributes(span.attributes),
            _attributes(resource.resource.attributes),
            span,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


class Receiver:
    """An OTLP receiver on loopback.

    Args:
        status: What it answers. Anything but 200 keeps nothing.
        keep: Whether to keep the requests; a receiver for a load test does not.
    """

    def __init__(self, *, status: int = 200, keep: bool = True) -> None:
        self.status = status
        self.keep = keep
        self.requests = 0
        self._bodies: list[bytes] = []
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver._take(self.path, self.headers.get("content-encoding"), body)
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                # What the Logfire SDK asks when it starts with a token: which project it belongs to.
                body = b'{"project_name": "here", "project_url": "http://127.0.0.1"}'
                self.send_response(HTTPStatus.OK)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        """For `OTEL_EXPORTER_OTLP_ENDPOINT`."""

    def _take(self, path: str, encoding: str | None, body: bytes) -> None:
        with self._lock:
            self.requests += 1
            if self.keep and self.status == HTTPStatus.OK and path == "/v1/traces":
                self._bodies.append(gzip.decompress(body) if encoding == "gzip" else body)

    @property
    def spans(self) -> list[ReceivedSpan]:
        """Every span that has arrived, in order of arrival."""
        with self._lock:
            bodies = list(self._bodies)
        # Decoded when asked for: under load the receiver must not be what is slow.
        return [span for body in bodies for span in decode(body)]

    def serve_forever(self) -> None:
        """Receive until `close`."""
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """Stop receiving."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def otlp_receiver(*, status: int = 200, keep: bool = True) -> Iterator[Receiver]:
    """Run a receiver in a thread. See `Receiver`."""
    receiver = Receiver(status=status, keep=keep)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    try:
        yield receiver
    finally:
        receiver.close()


if __name__ == "__main__":
    standalone = Receiver(keep=False)
    print(standalone.endpoint, flush=True)
    standalone.serve_forever()
