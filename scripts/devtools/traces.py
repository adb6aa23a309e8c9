"""Is the trace of a `POST /test-log` complete? Pure functions of the spans that arrived and of the stored rows."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from devtools.otlp import ReceivedSpan

ROWS: Final = """
SELECT 'log_l1 prompt_trace', id::text, request_id, trace_id
FROM mem0_cc.base_log JOIN mem0_cc.prompt_trace ON base_log_id = id
UNION ALL
SELECT 'log_l1 event_log', id::text, request_id, trace_id
FROM mem0_cc.base_log JOIN mem0_cc.event_log ON base_log_id = id"""


def by_trace(spans: Iterable[ReceivedSpan]) -> dict[str, list[ReceivedSpan]]:
    """Group spans by trace id; an absent id is an empty group. Pending spans of Logfire's live view are left out."""
    traces: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        if span.attributes.get("logfire.span_type") != "pending_span":
            traces[span.trace_id].append(span)
    return traces


def is_whole(spans: list[ReceivedSpan]) -> bool:
    """Tell whether the spans of one trace are all those of a request, with one request id.

    They are one server span with `layer=api` and, below it, a `log_l1` span with `layer=service` and its statement for
    each of the two records. Spans of other names may be among them.
    """
    servers = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER and not span.parent_id]
    records = [span for span in spans if span.name.startswith("log_l1 ")]
    return (
        [span.attributes.get("layer") for span in servers] == ["api"]
        and all(span.attributes.get("layer") == "service" for span in records)
        and [span.parent_id for span in records] == [servers[0].span_id] * 2
        and all("INSERT INTO mem0_cc." in span.attributes.get("db.query.text", "") for span in records)
        and len({span.attributes.get("request_id") for span in spans}) == 1
    )


def is_complete(answer: Mapping[str, str], spans: list[ReceivedSpan], rows: set[tuple[Any, ...]]) -> bool:
    """Tell whether a request can be followed: its trace is whole and names its two records, and so do their rows.

    `answer` is the body of its 200, empty for any other answer. `rows` is what `ROWS` returned.
    """
    if not answer or not is_whole(spans):
        return False
    records = {
        (f"log_l1 {table}", answer[f"{table}_id"], answer["request_id"], answer["trace_id"])
        for table in ("prompt_trace", "event_log")
    }
    spanned = {
        (span.name, span.attributes.get("mem0.record_id"), span.attributes.get("request_id"), span.trace_id)
        for span in spans
        if span.name.startswith("log_l1 ")
    }
    return spanned == records <= rows
