"""What `/docs` says about `POST /test-log`, held against what it answers."""

from typing import Any

import asyncpg
import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from backend.cc.cc_main import create_app
from backend.cc.config import Settings


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


async def test_400_is_as_described(app: FastAPI, client: httpx.AsyncClient) -> None:
    response = await client.post("/test-log", content=b'"\xff"', headers={"content-type": "application/json"})
    assert response.status_code == 400
    check(app, response)


async def test_500_is_as_described(app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection) -> None:
    await db.execute("DROP TABLE mem0_cc.base_log CASCADE")
    response = await client.post("/test-log", json={})
    assert response.status_code == 500
    check(app, response)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"tokens_in": -1}', b'{"role": 1}'])
async def test_422_is_as_described(app: FastAPI, client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/test-log", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    check(app, response)


@pytest.mark.parametrize("announced", [True, False])
async def test_413_is_as_described_with_and_without_content_length(
    app: FastAPI, client: httpx.AsyncClient, *, announced: bool
) -> None:
    async def in_pieces() -> Any:
        for _ in range(20):
            yield b" " * 65536

    content: Any = b" " * 1_048_577 if announced else in_pieces()
    response = await client.post("/test-log", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert ("text/plain" in response.headers["content-type"]) == announced
    check(app, response)


async def test_503_is_as_described() -> None:
    app = create_app(Settings(database_url=SecretStr("postgresql://nobody@127.0.0.1:1/nothing")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cc") as client:
        response = await client.post("/test-log", json={})
    assert response.status_code == 503
    check(app, response)
