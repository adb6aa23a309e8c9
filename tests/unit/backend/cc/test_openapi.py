"""What `/docs` says about `POST /test-log`, held against what it answers."""

from typing import Any

import asyncpg
import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from fastapi import FastAPI

from backend.cc.cc_main import create_app
from backend.cc.config import Settings
from support.clients import client_of


def operation(app: FastAPI) -> dict[str, Any]:
    described: dict[str, Any] = app.openapi()["paths"]["/test-log"]["post"]
    return described


def check(app: FastAPI, response: httpx.Response) -> None:
    """Hold an answer against its description: its media type, its headers and its body."""
    described = operation(app)["responses"][str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    schema = {**described["content"][media_type]["schema"], "components": app.openapi()["components"]}
    body = response.json() if media_type == "application/json" else response.text
    jsonschema.validate(body, schema)
    assert all(name in response.headers for name in described.get("headers", {}))
    if example := described["content"][media_type].get("example"):
        jsonschema.validate(example, schema)
        assert type(example) is type(body)


def test_it_is_described_with_every_answer_that_it_gives(app: FastAPI) -> None:
    assert operation(app)["summary"]
    assert operation(app)["description"]
    responses = operation(app)["responses"]
    assert responses.keys() == {"200", "400", "413", "422", "500", "503"}
    assert {
        status for status, described in responses.items() if "X-Request-ID" not in described.get("headers", {})
    } == {
        "422"  # FastAPI's own
    }
    assert "Retry-After" in responses["503"]["headers"]


async def test_the_examples_work_when_pressed(app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    properties = app.openapi()["components"]["schemas"]["TestLogRequest"]["properties"]
    response = await client.post("/test-log", json={name: each["examples"][0] for name, each in properties.items()})
    assert response.status_code == 200
    check(app, response)
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.base_log") == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'"\xff"', 400), (b"[]", 422), (b'{"role": 1}', 422), (b" " * 1_048_577, 413), (b"{}", 500)],
    ids=["400", "422", "422 of a field", "413", "500"],
)
async def test_a_refusal_and_a_failure_are_as_described(
    app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection, body: bytes, status: int
) -> None:
    await db.execute("DROP TABLE mem0_cc.base_log CASCADE")
    response = await client.post("/test-log", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    check(app, response)


async def test_413_is_json_if_no_content_length_announced_it(app: FastAPI, client: httpx.AsyncClient) -> None:
    async def in_pieces() -> Any:
        for _ in range(20):
            yield b" " * 65536

    response = await client.post("/test-log", content=in_pieces(), headers={"content-type": "application/json"})
    assert (response.status_code, response.headers["content-type"]) == (413, "application/json")
    check(app, response)


async def test_503_is_as_described() -> None:
    app = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/nothing"))
    async with client_of(app) as client:
        response = await client.post("/test-log", json={})
    assert response.status_code == 503
    check(app, response)
