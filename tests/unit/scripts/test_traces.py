"""What counts as a complete trace: one real request, then the same with one thing amiss."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from devtools.otlp import ReceivedSpan, otlp_receiver
from devtools.service import running_service
from devtools.traces import ROWS, by_trace, is_complete, is_whole

Spans = list[ReceivedSpan]
Rows = dict[str, Any]


@pytest.fixture
async def request_(database_url: str, db: asyncpg.Connection, tmp_path: Path) -> tuple[dict[str, str], Spans, Rows]:
    """A request's answer, its spans and its rows."""
    with otlp_receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        with running_service(database_url, tmp_path / "log", **environment) as service:
            answer = (await asyncio.to_thread(httpx.post, f"{service.url}/test-log", json={})).json()
            await asyncio.to_thread(service.stop)
        spans = by_trace(receiver.spans)[answer["trace_id"]]
    return answer, spans, {row["id"]: dict(row) for row in await db.fetch(ROWS)}


def without(name: str) -> Callable[[Spans, Rows], Spans]:
    def change(spans: Spans, _: Rows) -> Spans:
        first = next(span for span in spans if span.name == name)
        return [span for span in spans if span is not first]

    return change


def with_attribute(name: str, key: str, value: str) -> Callable[[Spans, Rows], Spans]:
    def change(spans: Spans, _: Rows) -> Spans:
        first = next(span for span in spans if span.name == name)
        changed = dataclasses.replace(first, attributes={**first.attributes, key: value})
        return [changed if span is first else span for span in spans]

    return change


def with_value(key: str, value: object) -> Callable[[Spans, Rows], Spans]:
    def change(spans: Spans, rows: Rows) -> Spans:
        next(iter(rows.values()))[key] = value
        return spans

    return change


def without_a_row(spans: Spans, rows: Rows) -> Spans:
    rows.popitem()
    return spans


def with_a_stranger_s_child(spans: Spans, _: Rows) -> Spans:
    return [dataclasses.replace(span, parent_id="0" * 16) if span.name == "log_l1" else span for span in spans]


AMISS = [
    without("POST /test-log"),
    without("log_l1"),
    with_attribute("POST /test-log", "layer", "service"),
    with_attribute("log_l1", "layer", "api"),
    with_attribute("log_l1", "mem0.record_id", "another"),
    with_attribute("POST /test-log", "request_id", "another"),
    with_attribute("log_l1", "request_id", "another"),
    with_attribute("log_l1", "db.query.text", ""),
    with_a_stranger_s_child,
    without_a_row,
    with_value("request_id", "another"),
    with_value("trace_id", "another"),
    with_value("prompt", None),
]


async def test_a_real_request_is_complete_and_with_anything_amiss_it_is_not(
    request_: tuple[dict[str, str], Spans, Rows],
) -> None:
    assert is_complete(*request_)
    assert is_whole(request_[1])
    for number, change in enumerate(AMISS):
        answer, spans, rows = request_
        rows = {record_id: dict(row) for record_id, row in rows.items()}
        assert not is_complete(answer, change(spans, rows), rows), number


def test_a_request_that_was_not_answered_is_not_complete() -> None:
    assert not is_complete({}, [], {})
