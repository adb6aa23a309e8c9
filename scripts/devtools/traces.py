"""Is the trace of a `POST /test-log` complete? Pure functions of the spans that arrived and of the stored rows."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from devtools.otlp import ReceivedSpan

ROWS: Final = """
SELECT id::text, request_id, trace_id,
       prompt_trace.base_log_id IS NOT NULL AS prompt, event_log.base_log_id IS NOT NULL AS event
FROM mem0_cc.base_log
LEFT JOIN mem0_cc.prompt_trace ON prompt_trace.base_log_id = id
LEFT JOIN mem0_cc.event_log ON event_log.base_log_id = id"""


def by_trace(spans: Iterable[ReceivedSpan]) -> dict[str, list[ReceivedSpan]]:
    """Group spans by trace id; an absent id is an empty group. Pending spans of Logfire's live view are left out."""
    traces: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        if span.attributes.get("logfire.span_type") != "pending_span":
            traces[span.trace_id].append(span)
    return traces


def is_whole(spans: list[ReceivedSpan]) -> bool:
    """Tell whether the spans of one trace are all those of a request.

    They are one server span with `layer=api` and, below it, for each of the two records a `log_l1` span with
    `layer=service` and its statement. All have one request id. Spans of other names may be among them.
    """
    servers = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER and not span.parent_id]
    services = [span for span in spans if span.name == "log_l1"]
    return (
        [span.attributes.get("layer") for span in servers] == ["api"]
        and all(span.attributes.get("layer") == "service" for span in services)
        and [span.parent_id for span in services] == [servers[0].span_id] * 2
        and all("INSERT INTO mem0_cc." in span.attributes.get("db.query.text", "") for span in services)
        and len({span.attributes.get("request_id") for span in spans}) == 1
    )


def is_complete(answer: Mapping[str, str], spans: list[ReceivedSpan], rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether a request can be followed: its trace is whole, names its two records, and their rows have its ids.

    `answer` is the body of its 200, empty for any other answer. `rows` is what `ROWS` returned, by id.
    """
    if not answer or not is_whole(spans):
        return False
    ids = (answer["request_id"], answer["trace_id"])
    records = {answer["prompt_trace_id"]: "prompt", answer["event_log_id"]: "event"}
    found = [rows.get(record_id, {}) for record_id in records]
    return (
        {span.attributes.get("mem0.record_id") for span in spans if span.name == "log_l1"} == records.keys()
        and all((span.attributes["request_id"], span.trace_id) == ids for span in spans)
        and all((row.get("request_id"), row.get("trace_id")) == ids for row in found)
        and all(row[kind] for row, kind in zip(found, records.values(), strict=True))
    )
