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
"""The query for the rows that `is_complete` looks at."""

RECORDS: Final = 2
"""Records that a request writes: a prompt and an event."""


def by_trace(spans: Iterable[ReceivedSpan]) -> dict[str, list[ReceivedSpan]]:
    """Group spans by their trace id; an id that has none is an empty group.

    Logfire's pending spans are left out. With a token each span is also sent when it starts, for the live view.
    """
    traces: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        if span.attributes.get("logfire.span_type") != "pending_span":
            traces[span.trace_id].append(span)
    return traces


def is_whole(spans: list[ReceivedSpan]) -> bool:
    """Tell whether all spans of a request have arrived.

    Args:
        spans: All that arrived of one trace.

    Returns:
        Whether there are one server span with `layer=api`, below it a `log_l1` span with `layer=service` and its
        statement for each record, and one request id on all of them.
    """
    servers = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER and not span.parent_id]
    services = [span for span in spans if span.name == "log_l1"]
    return (
        [span.attributes.get("layer") for span in servers] == ["api"]
        and [span.attributes.get("layer") for span in services] == ["service"] * RECORDS
        and all(span.parent_id == servers[0].span_id for span in services)
        and all("INSERT INTO mem0_cc." in span.attributes.get("db.query.text", "") for span in services)
        and len({span.attributes.get("request_id") for span in spans}) == 1
    )


def is_complete(answer: Mapping[str, str], spans: list[ReceivedSpan], rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether a request can be followed from its entry to its rows.

    Args:
        answer: The body of the 200 that the service answered; empty for any other answer.
        spans: All that arrived of the trace that the answer names.
        rows: What `ROWS` returned, by id.

    Returns:
        Whether the trace is whole and names the answer's records, and both rows have the answer's request id and
        trace id.
    """
    if not answer:
        return False
    records = {answer["prompt_trace_id"]: "prompt", answer["event_log_id"]: "event"}
    ids = (answer["request_id"], answer["trace_id"])
    return (
        is_whole(spans)
        and {span.attributes.get("mem0.record_id") for span in spans if span.name == "log_l1"} == records.keys()
        and all((span.attributes["request_id"], span.trace_id) == ids for span in spans)
        and all(record_id in rows and rows[record_id][kind] for record_id, kind in records.items())
        and all((rows[record_id]["request_id"], rows[record_id]["trace_id"]) == ids for record_id in records)
    )
