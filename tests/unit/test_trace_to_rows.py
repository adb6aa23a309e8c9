"""The queries that docs/tracing.md tells people to paste, run as they stand there."""

import json
import re
from typing import Any

import asyncpg
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from devtools import ROOT

DOCUMENT = (ROOT / "docs/tracing.md").read_text()
BY_REQUEST_IN_LOGFIRE, BY_RECORD_IN_LOGFIRE, BY_REQUEST = re.findall(r"```sql\n(.*?)```", DOCUMENT, re.DOTALL)
BY_TRACE, BY_RECORD = (
    re.sub("WHERE .*", condition, BY_REQUEST)
    for condition in re.findall(r"`(WHERE (?:trace_id|id) = '<.*?>')`", DOCUMENT)
)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
async def answer(client: httpx.AsyncClient) -> dict[str, str]:
    """The answer of one request among others."""
    body = {"content": "Paris?", "event_type": "model.answered", "payload": {"model": "small"}}
    await client.post("/test-log", json={})
    response = await client.post("/test-log", json=body)
    await client.post("/test-log", json={})
    answer: dict[str, str] = response.json()
    assert response.headers["X-Request-ID"] == answer["request_id"]
    return answer


@pytest.fixture
def ids(answer: dict[str, str], exporter: InMemorySpanExporter) -> dict[str, str]:
    """What a person would copy from the answer and from the trace, by its placeholder in the document."""
    wanted = {"request_id": answer["request_id"], "mem0.event_type": "prompt_trace"}.items()
    (prompt,) = [span for span in exporter.get_finished_spans() if wanted <= attributes(span).items()]
    record_id = attributes(prompt)["mem0.record_id"]
    assert record_id == answer["prompt_trace_id"]
    return {"<request id>": answer["request_id"], "<trace id>": answer["trace_id"], "<mem0.record_id>": record_id}


def filled_in(query: str, ids: dict[str, str]) -> str:
    (placeholder,) = [placeholder for placeholder in ids if placeholder in query]
    return query.replace(placeholder, ids[placeholder])


@pytest.mark.parametrize("query", [BY_REQUEST, BY_TRACE], ids=["request id", "trace id"])
async def test_a_request_s_id_and_a_trace_s_id_find_both_its_records_and_no_other(
    query: str, answer: dict[str, str], ids: dict[str, str], db: asyncpg.Connection
) -> None:
    prompt, event = await db.fetch(filled_in(query, ids))
    assert [str(prompt["id"]), str(event["id"])] == [answer["prompt_trace_id"], answer["event_log_id"]]
    for row in (prompt, event):
        assert (row["request_id"], row["trace_id"]) == (answer["request_id"], answer["trace_id"])
    assert (prompt["role"], prompt["content"], prompt["payload"]) == ("user", "Paris?", None)
    assert (event["event_type"], event["role"]) == ("model.answered", None)
    assert json.loads(event["payload"]) == {"model": "small"}


async def test_a_span_s_record_id_finds_its_record(ids: dict[str, str], db: asyncpg.Connection) -> None:
    (row,) = await db.fetch(filled_in(BY_RECORD, ids))
    assert (str(row["id"]), row["content"]) == (ids["<mem0.record_id>"], "Paris?")


async def test_rows_are_found_by_an_index(ids: dict[str, str], db: asyncpg.Connection) -> None:
    await db.execute("SET enable_seqscan = off")  # three rows are read faster without one
    for query in (BY_REQUEST, BY_TRACE, BY_RECORD):
        plan = "\n".join(row[0] for row in await db.fetch(f"EXPLAIN {filled_in(query, ids)}"))
        assert re.search(r"Index Cond: \(+(request_id|trace_id|id)\S* = '", plan), plan


async def test_logfire_s_queries_find_the_whole_trace_of_a_request_and_the_request_of_a_record(
    answer: dict[str, str], ids: dict[str, str], exporter: InMemorySpanExporter, db: asyncpg.Connection
) -> None:
    """The spans as Logfire keeps them: in a table `records` with the columns that its documentation names."""
    await db.execute(
        "CREATE TEMPORARY TABLE records (start_timestamp timestamptz, duration float8, trace_id text, span_name text, "
        "attributes jsonb)"
    )
    for span in exporter.get_finished_spans():
        trace_id = format(span.context.trace_id, "032x")
        values = (span.start_time, span.end_time, trace_id, span.name, json.dumps(attributes(span)))
        await db.execute("INSERT INTO records SELECT to_timestamp($1 / 1e9), ($2 - $1) / 1e9, $3, $4, $5", *values)
    rows = await db.fetch(filled_in(BY_REQUEST_IN_LOGFIRE, ids))
    assert [row["span_name"] for row in rows] == ["POST /test-log", "log_l1 prompt_trace", "log_l1 event_log"]
    assert [row["layer"] for row in rows] == ["api", "service", "service"]
    assert {row["record_id"] for row in rows} == {None, answer["prompt_trace_id"], answer["event_log_id"]}
    (row,) = await db.fetch(filled_in(BY_RECORD_IN_LOGFIRE, ids))
    found = {"trace_id": answer["trace_id"], "request_id": answer["request_id"], "event_type": "prompt_trace"}
    assert dict(row) == found
