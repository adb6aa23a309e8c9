"""The queries that docs/tracing.md tells people to paste, run as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

DOCUMENT = (Path(__file__).parent.parent.parent / "docs/tracing.md").read_text()
(ROW_QUERY, *LOGFIRE_QUERIES) = sorted(
    re.findall(r"```sql\n(.*?)```", DOCUMENT, re.DOTALL), key=lambda query: "FROM records" in query
)
ROW_QUERIES = [
    re.sub("WHERE .*", condition, ROW_QUERY)
    for condition in re.findall(r"WHERE (?:request_id|trace_id|id) = '<.*?>'", DOCUMENT)
]


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


def filled_in(query: str, answer: dict[str, str], exporter: InMemorySpanExporter) -> str:
    """Return the query with the ids that a person would copy from the answer and from the trace."""
    ids = {
        "<request id>": answer["request_id"],
        "<trace id>": answer["trace_id"],
        "<mem0.record_id>": str(attributes(prompt_span(answer, exporter))["mem0.record_id"]),
    }
    assert sum(placeholder in query for placeholder in ids) == 1
    for placeholder, value in ids.items():
        query = query.replace(placeholder, value)
    return query


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def prompt_span(answer: dict[str, str], exporter: InMemorySpanExporter) -> ReadableSpan:
    wanted = {"request_id": answer["request_id"], "mem0.event_type": "prompt_trace"}
    (span,) = [span for span in exporter.get_finished_spans() if wanted.items() <= attributes(span).items()]
    return span


def test_the_document_says_how_to_find_rows_by_request_by_trace_and_by_record() -> None:
    assert [query.splitlines()[-2] for query in ROW_QUERIES] == [
        "WHERE request_id = '<request id>'",
        "WHERE trace_id = '<trace id>'",
        "WHERE id = '<mem0.record_id>'",
    ]
    assert len(LOGFIRE_QUERIES) == 2


@pytest.mark.parametrize("query", ROW_QUERIES[:2], ids=["request id", "trace id"])
async def test_a_request_s_id_and_a_trace_s_id_find_both_its_records_and_no_other(
    query: str, answer: dict[str, str], exporter: InMemorySpanExporter, db: asyncpg.Connection
) -> None:
    prompt, event = await db.fetch(filled_in(query, answer, exporter))
    assert [str(prompt["id"]), str(event["id"])] == [answer["prompt_trace_id"], answer["event_log_id"]]
    for row in (prompt, event):
        assert (row["request_id"], row["trace_id"]) == (answer["request_id"], answer["trace_id"])
    assert (prompt["role"], prompt["content"], prompt["payload"]) == ("user", "Paris?", None)
    assert (event["event_type"], json.loads(event["payload"]), event["role"]) == (
        "model.answered",
        {"model": "small"},
        None,
    )


async def test_a_span_s_record_id_finds_its_record(
    answer: dict[str, str], exporter: InMemorySpanExporter, db: asyncpg.Connection
) -> None:
    (row,) = await db.fetch(filled_in(ROW_QUERIES[2], answer, exporter))
    assert str(row["id"]) == answer["prompt_trace_id"]
    assert row["content"] == "Paris?"


async def test_rows_are_found_by_an_index(
    answer: dict[str, str], exporter: InMemorySpanExporter, db: asyncpg.Connection
) -> None:
    await db.execute("SET enable_seqscan = off")  # three rows are read faster without one
    for query in ROW_QUERIES:
        plan = "\n".join(row[0] for row in await db.fetch(f"EXPLAIN {filled_in(query, answer, exporter)}"))
        assert re.search(r"Index Cond: \(+(request_id|trace_id|id)\S* = '", plan), plan


@pytest.fixture
async def records(exporter: InMemorySpanExporter, answer: dict[str, str], db: asyncpg.Connection) -> None:
    """The spans as Logfire keeps them, in a table `records` with the columns that its documentation names."""
    await db.execute(
        "CREATE TEMPORARY TABLE records (start_timestamp timestamptz, duration float8, trace_id text, span_id text, "
        "span_name text, attributes jsonb)"
    )
    for span in exporter.get_finished_spans():
        start, end, context = span.start_time, span.end_time, span.context
        assert start is not None
        assert end is not None
        assert context is not None
        await db.execute(
            "INSERT INTO records VALUES (to_timestamp($1::float8), $2, $3, $4, $5, $6)",
            start / 1e9,
            (end - start) / 1e9,
            format_trace_id(context.trace_id),
            format_span_id(context.span_id),
            span.name,
            json.dumps(attributes(span)),
        )


@pytest.mark.usefixtures("records")
async def test_logfire_s_query_by_request_id_finds_the_whole_trace(
    answer: dict[str, str], exporter: InMemorySpanExporter, db: asyncpg.Connection
) -> None:
    rows = await db.fetch(filled_in(LOGFIRE_QUERIES[0], answer, exporter))
    assert [row["span_name"] for row in rows] == ["POST /test-log", "log_l1 prompt_trace", "log_l1 event_log"]
    assert [row["layer"] for row in rows] == ["api", "service", "service"]
    assert {row["record_id"] for row in rows} == {None, answer["prompt_trace_id"], answer["event_log_id"]}


@pytest.mark.usefixtures("records")
async def test_logfire_s_query_by_record_id_finds_the_request(
    answer: dict[str, str], exporter: InMemorySpanExporter, db: asyncpg.Connection
) -> None:
    (row,) = await db.fetch(filled_in(LOGFIRE_QUERIES[1], answer, exporter))
    assert dict(row) == {
        "trace_id": answer["trace_id"],
        "request_id": answer["request_id"],
        "event_type": "prompt_trace",
    }
