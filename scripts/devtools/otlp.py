"""Receive OTLP traces over HTTP and keep what arrives. `python -m devtools.otlp` runs a receiver that keeps nothing."""

import gzip
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from devtools.ports import HOST


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived, its ids in hexadecimal."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    proto: Span = field(repr=False)


def _decode(body: bytes) -> Iterator[ReceivedSpan]:
    for sender in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(sender.resource.attributes)
        for span in (span for scope in sender.scope_spans for span in scope.spans):
            ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
            yield ReceivedSpan(span.name, *ids, span.kind, _attributes(span.attributes), resource, span)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


class Receiver(ThreadingHTTPServer):
    """An OTLP receiver on the loopback interface.

    Args:
        status: What it answers. Anything but 200 keeps nothing.
        keep: Whether to keep what arrives; a receiver for a load test does not.
    """

    daemon_threads = True

    def __init__(self, *, status: int = 200, keep: bool = True) -> None:
        super().__init__((HOST, 0), _Handler)
        self.endpoint = f"http://{HOST}:{self.server_port}"
        self.status = status
        self._keep = keep and status == HTTPStatus.OK
        self._bodies: list[bytes] = []

    def take(self, path: str, body: bytes) -> None:
        """Count an export request, and keep it if it has traces."""
        self._bodies.append(body if self._keep and path == "/v1/traces" else b"")

    @property
    def requests(self) -> int:
        """How many export requests have arrived."""
        return len(self._bodies)

    @property
    def spans(self) -> list[ReceivedSpan]:
        """Every span that has arrived, in order of arrival. Receiving stays cheap, because they are decoded here."""
        return [span for body in list(self._bodies) for span in _decode(body)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.take(self.path, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
        self._answer(self.server.status)

    def do_GET(self) -> None:
        # The Logfire SDK asks at its start which project the token belongs to.
        self._answer(HTTPStatus.OK, b'{"project_name": "here", "project_url": "http://127.0.0.1"}')

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def otlp_receiver(*, status: int = 200, keep: bool = True) -> Iterator[Receiver]:
    """Run a receiver in a thread. See `Receiver`."""
    with Receiver(status=status, keep=keep) as receiver:
        threading.Thread(target=receiver.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield receiver
        finally:
            receiver.shutdown()


if __name__ == "__main__":
    standalone = Receiver(keep=False)
    print(standalone.endpoint, flush=True)
    standalone.serve_forever()
