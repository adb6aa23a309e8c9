import json
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

JSON = {"content-type": "application/json"}


async def stored(db: asyncpg.Connection, answer: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    prompt = await db.fetchrow(
        "SELECT role, content, tokens_in, tokens_out FROM mem0_cc.prompt_trace WHERE base_log_id = $1",
        answer["prompt_trace_id"],
    )
    event = await db.fetchrow(
        "SELECT event_type, payload FROM mem0_cc.event_log WHERE base_log_id = $1", answer["event_log_id"]
    )
    return dict(prompt), {"event_type": event["event_type"], "payload": json.loads(event["payload"])}


async def test_both_rows_are_committed_and_linked_when_the_answer_arrives(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    response = await client.post("/test-log", json={"message": "hello"})
    assert response.status_code == 200
    answer = response.json()
    assert answer.keys() == {"request_id", "trace_id", "prompt_trace_id", "event_log_id"}
    assert answer["request_id"] == response.headers["x-request-id"]
    rows = await db.fetch("SELECT id::text, request_id, trace_id FROM mem0_cc.base_log ORDER BY id")
    assert [tuple(row) for row in rows] == [
        (answer["prompt_trace_id"], answer["request_id"], answer["trace_id"]),
        (answer["event_log_id"], answer["request_id"], answer["trace_id"]),
    ]
    assert await stored(db, answer) == (
        {"role": "user", "content": "", "tokens_in": 0, "tokens_out": 0},
        {"event_type": "test_log", "payload": {"message": "hello"}},
    )


async def test_every_key_goes_where_it_belongs_and_the_rest_into_the_payload(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    body = {
        "role": "assistant",
        "content": "Paris.",
        "tokens_in": 12.0,
        "tokens_out": 2**31 - 1,
        "event_type": "model.answered",
        "payload": {"model": "small", "nested": {"payload": None}},
        "more": [1],
    }
    assert await stored(db, (await client.post("/test-log", json=body)).json()) == (
        {"role": "assistant", "content": "Paris.", "tokens_in": 12, "tokens_out": 2**31 - 1},
        {
            "event_type": "model.answered",
            "payload": {"model": "small", "nested": {"payload": None}, "more": [1]},
        },
    )


async def test_an_empty_object_is_enough(client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    _, event = await stored(db, (await client.post("/test-log", json={})).json())
    assert event == {"event_type": "test_log", "payload": {}}


async def test_the_media_type_may_have_parameters(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post("/test-log", content="{}", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({"role": ""}, ["body", "role"]),
        ({"role": 5}, ["body", "role"]),
        ({"role": None}, ["body", "role"]),
        ({"role": "r" * 256}, ["body", "role"]),
        ({"content": ["secret"]}, ["body", "content"]),
        ({"tokens_in": -1}, ["body", "tokens_in"]),
        ({"tokens_in": 1.5}, ["body", "tokens_in"]),
        ({"tokens_out": 2**31}, ["body", "tokens_out"]),
        ({"tokens_out": True}, ["body", "tokens_out"]),
        ({"tokens_out": "1"}, ["body", "tokens_out"]),
        ({"event_type": ""}, ["body", "event_type"]),
        ({"event_type": {"secret": 1}}, ["body", "event_type"]),
        ({"payload": ["secret"]}, ["body", "payload"]),
        ({"payload": {"secret": 1}, "secret": 2}, ["body"]),
        (["secret"], ["body"]),
        ("secret", ["body"]),
        (None, ["body"]),
    ],
    ids=repr,
)
async def test_a_wrong_body_is_a_422_that_says_where_and_leaves_nothing(
    client: httpx.AsyncClient, db: asyncpg.Connection, body: object, location: list[str]
) -> None:
    response = await client.post("/test-log", content=json.dumps(body), headers=JSON)
    assert response.status_code == 422
    (problem,) = response.json()["detail"]
    assert problem.keys() == {"type", "loc", "msg"}
    assert problem["loc"] == location
    assert "secret" not in response.text
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"secret", 422),
        (b'{"a": "\xff"}', 400),
        (b'{"a": ' + b"1" * 200_000 + b"}", 400),
        (b'{"a":' + b"[" * 100_000, 400),
    ],
    ids=["nothing", "a brace", "a word", "not UTF-8", "a long number", "many brackets"],
)
async def test_what_is_not_json_is_refused_and_not_repeated(
    client: httpx.AsyncClient, body: bytes, status: int
) -> None:
    response = await client.post("/test-log", content=body, headers=JSON)
    assert response.status_code == status
    assert "secret" not in response.text


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
async def test_another_media_type_is_a_422(client: httpx.AsyncClient, media_type: str | None) -> None:
    headers = {"content-type": media_type} if media_type else {}
    response = await client.post("/test-log", content=b'{"message": "hello"}', headers=headers)
    assert response.status_code == 422


async def test_a_client_that_leaves_before_its_body_is_complete_is_no_error_of_ours(app: FastAPI) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/test-log", "headers": [(b"content-type", b"application/json")]}
    await app({**scope, "query_string": b""}, receive, send)
    assert sent[0]["status"] == 400


async def test_text_that_postgresql_cannot_store_is_stored_with_replacement_characters(
    client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    response = await client.post("/test-log", content=rb'{"role": "\ud800", "content": "\u0000"}', headers=JSON)
    assert response.status_code == 200
    assert tuple(await db.fetchrow("SELECT role, content FROM mem0_cc.prompt_trace")) == ("\ufffd", "\ufffd")
