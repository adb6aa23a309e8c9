"""`POST /test-log`, each answer held against what `/docs` says of it."""

import json
from typing import Any

import asyncpg
import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from fastapi import FastAPI

from backend.cc.cc_main import create_app
from backend.cc.config import Settings
from support.clients import client_of

JSON = {"content-type": "application/json"}


def operation(app: FastAPI) -> dict[str, Any]:
    described: dict[str, Any] = app.openapi()["paths"]["/test-log"]["post"]
    return described


def check(app: FastAPI, response: httpx.Response, status: int) -> None:
    """Hold an answer against its description: its status, its media type, its headers and its body."""
    assert response.status_code == status
    described = operation(app)["responses"][str(status)]
    media_type = response.headers["content-type"].partition(";")[0]
    schema = {**described["content"][media_type]["schema"], "components": app.openapi()["components"]}
    jsonschema.validate(response.json() if media_type == "application/json" else response.text, schema)
    assert all(name in response.headers for name in described.get("headers", {}))


async def stored(db: asyncpg.Connection, answer: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    prompt = await db.fetchrow(
        "SELECT role, content, tokens_in, tokens_out FROM mem0_cc.prompt_trace WHERE base_log_id = $1",
        answer["prompt_trace_id"],
    )
    event = await db.fetchrow(
        "SELECT event_type, payload FROM mem0_cc.event_log WHERE base_log_id = $1", answer["event_log_id"]
    )
    return dict(prompt), {"event_type": event["event_type"], "payload": json.loads(event["payload"])}


def test_it_is_described_with_every_answer_that_it_gives(app: FastAPI) -> None:
    assert operation(app)["summary"]
    assert operation(app)["description"]
    responses = operation(app)["responses"]
    assert responses.keys() == {"200", "400", "413", "422", "500", "503"}
    without_id = {status for status, each in responses.items() if "X-Request-ID" not in each.get("headers", {})}
    assert without_id == {"422"}  # FastAPI's own
    assert "Retry-After" in responses["503"]["headers"]


async def test_the_examples_work_when_pressed(app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    properties = app.openapi()["components"]["schemas"]["TestLogRequest"]["properties"]
    response = await client.post("/test-log", json={name: each["examples"][0] for name, each in properties.items()})
    check(app, response, 200)
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 2


async def test_both_rows_are_committed_and_linked_when_the_answer_arrives(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    response = await client.post("/test-log", json={"message": "hello"})
    answer = response.json()
    assert answer.keys() == {"request_id", "trace_id", "prompt_trace_id", "event_log_id"}
    assert answer["request_id"] == response.headers["x-request-id"]
    rows = await db.fetch("SELECT id::text, request_id, trace_id FROM mem0_cc.base_log ORDER BY id")
    ids = answer["request_id"], answer["trace_id"]
    assert [tuple(row) for row in rows] == [(answer["prompt_trace_id"], *ids), (answer["event_log_id"], *ids)]
    assert await stored(db, answer) == (
        {"role": "user", "content": "", "tokens_in": 0, "tokens_out": 0},
        {"event_type": "test_log", "payload": {"message": "hello"}},
    )


async def test_every_key_goes_where_it_belongs_and_the_rest_into_the_payload(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    body = {
        "role": "assistant",
        "content": "a\0b",
        "tokens_in": 12.0,
        "tokens_out": "2147483647",
        "event_type": "model.answered",
        "payload": {"model": "small", "nested": {"payload": None}},
        "more": [1],
    }
    assert await stored(db, (await client.post("/test-log", json=body)).json()) == (
        {"role": "assistant", "content": "a\ufffdb", "tokens_in": 12, "tokens_out": 2**31 - 1},
        {
            "event_type": "model.answered",
            "payload": {"model": "small", "nested": {"payload": None}, "more": [1]},
        },
    )


@pytest.mark.parametrize(
    ("body", "location"),
    [
        (b"", ["body"]),
        (b"null", ["body"]),
        (b'["secret"]', ["body"]),
        (b"{", ["body", 1]),
        (b'{"k": "secret\0"}', ["body", 13]),
        (b'{"role": ""}', ["body", "role"]),
        (b'{"role": 5}', ["body", "role"]),
        (b'{"role": "' + b"r" * 256 + b'"}', ["body", "role"]),
        (rb'{"role": "secret\ud800"}', ["body", "role"]),
        (b'{"content": ["secret"]}', ["body", "content"]),
        (b'{"tokens_in": -1}', ["body", "tokens_in"]),
        (b'{"tokens_in": 1.5}', ["body", "tokens_in"]),
        (b'{"tokens_in": NaN}', ["body", "tokens_in"]),
        (b'{"tokens_out": 2147483648}', ["body", "tokens_out"]),
        (b'{"tokens_out": "secret"}', ["body", "tokens_out"]),
        (b'{"event_type": ""}', ["body", "event_type"]),
        (b'{"event_type": {"secret": 1}}', ["body", "event_type"]),
        (b'{"payload": ["secret"]}', ["body", "payload"]),
        (b'{"payload": {"secret": 1}, "secret": 2}', ["body"]),
    ],
)
async def test_a_wrong_body_is_a_422_that_says_where_and_repeats_and_leaves_nothing(
    app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection, body: bytes, location: list[str | int]
) -> None:
    response = await client.post("/test-log", content=body, headers=JSON)
    check(app, response, 422)
    (problem,) = response.json()["detail"]
    assert problem.keys() == {"type", "loc", "msg"}
    assert problem["loc"] == location
    assert "secret" not in response.text
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "secret\xff"}',
        b'{"a": ' + b"1" * 200_000 + b"}",
        b'{"tokens_in": -' + b"1" * 200_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 100_000,
    ],
    ids=["not UTF-8", "a long number", "a long number of tokens", "many objects", "many brackets"],
)
async def test_what_cannot_be_read_as_json_is_a_400_and_not_repeated(
    app: FastAPI, client: httpx.AsyncClient, body: bytes
) -> None:
    response = await client.post("/test-log", content=body, headers=JSON)
    check(app, response, 400)
    assert "secret" not in response.text


@pytest.mark.parametrize(("announced", "media_type"), [(True, "text/plain"), (False, "application/json")])
async def test_a_body_over_the_limit_is_a_413_with_and_without_content_length(
    app: FastAPI, client: httpx.AsyncClient, *, announced: bool, media_type: str
) -> None:
    async def in_pieces() -> Any:
        for _ in range(20):
            yield b" " * 65536

    content: Any = b" " * 1_048_577 if announced else in_pieces()
    response = await client.post("/test-log", content=content, headers=JSON)
    check(app, response, 413)
    assert response.headers["content-type"].startswith(media_type)


async def test_a_missing_migration_is_a_500(app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    await db.execute("DROP TABLE mem0_cc.base_log CASCADE")
    check(app, await client.post("/test-log", json={}), 500)


async def test_an_unreachable_database_is_a_503() -> None:
    app = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/nothing"))
    async with client_of(app) as client:
        check(app, await client.post("/test-log", json={}), 503)


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"content-type": "Application/JSON; charset=utf-8"}, 200), ({}, 422), ({"content-type": "text/plain"}, 422)],
)
async def test_a_body_is_json_only_if_it_says_so(client: httpx.AsyncClient, headers: Any, status: int) -> None:
    """A browser asks before it sends JSON to another origin; other media types it sends without asking."""
    response = await client.post("/test-log", content=b"{}", headers=headers)
    assert response.status_code == status
