from typing import Any
from uuid import UUID

import httpx
import pytest
from opentelemetry import trace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from common.request_id_middleware import RequestIDMiddleware, request_id_var


async def say_id(request: Request) -> PlainTextResponse:
    assert request.state.request_id == request_id_var.get()
    return PlainTextResponse(request.state.request_id, headers={"x-request-id": "from-the-endpoint"})


async def fail(_: Request) -> PlainTextResponse:
    raise RuntimeError


async def greet(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(websocket.state.request_id)
    await websocket.close()


APP = Starlette(routes=[Route("/", say_id), Route("/fail", fail), WebSocketRoute("/ws", greet)])


async def get(path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(RequestIDMiddleware(APP))
    async with httpx.AsyncClient(transport=transport, base_url="http://cc", headers=headers) as client:
        return await client.get(path)


async def call(app: ASGIApp, *ids: bytes, **scope: Any) -> list[Message]:
    """Call an application inside the middleware, and return what it sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"x-request-id", value) for value in ids]
    await RequestIDMiddleware(app)({"type": "http", "headers": headers, **scope}, receive, send)
    return sent


async def id_for(*inbound: bytes) -> str | None:
    seen: list[str | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(request_id_var.get())

    await call(app, *inbound)
    return seen[0]


async def test_a_request_without_an_id_gets_a_uuid_v4_and_its_answer_says_it_once_whatever_the_endpoint_set() -> None:
    response = await get("/")
    assert UUID(response.text).version == 4
    assert response.headers.get_list("x-request-id") == [response.text] == [str(UUID(response.text))]


@pytest.mark.parametrize("kept", ["a", "A.b_c-9", "x" * 128, "0af7651916cd43dd8448eb211c80319c"])
async def test_an_inbound_id_that_fits_is_kept(kept: str) -> None:
    assert await id_for(kept.encode()) == kept


UNFIT = ["", "x" * 129, "a b", "a\tb", "a/b", "é", "<script>", "a\0b", "²", "٣", "abc\n", "a\r\nset-cookie: a=b"]


@pytest.mark.parametrize("inbound", [*([unfit] for unfit in UNFIT), ["one", "two"]])
async def test_an_inbound_id_that_does_not_fit_is_replaced_and_so_are_two(inbound: list[str]) -> None:
    assert UUID(await id_for(*map(str.encode, inbound))).version == 4


async def test_an_unhandled_exception_names_the_request_in_the_servers_log() -> None:
    with pytest.raises(RuntimeError) as raised:
        await get("/fail", **{"x-request-id": "mine"})
    assert raised.value.__notes__ == ["request id: mine"]


async def test_a_websocket_has_an_id_and_its_handshake_says_it() -> None:
    accepted, greeting, _ = await call(APP, b"mine", type="websocket", path="/ws")
    assert accepted["headers"] == [(b"x-request-id", b"mine")]
    assert greeting["text"] == "mine"


async def test_an_answer_without_headers_gets_the_one() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})

    assert await call(app, b"mine") == [
        {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"mine")]}
    ]


async def test_other_scopes_pass_through_untouched() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope == {"type": "lifespan", "headers": []}
        assert request_id_var.get() is None
        await send({"type": "lifespan.startup.complete"})

    assert await call(app, type="lifespan") == [{"type": "lifespan.startup.complete"}]


async def test_nothing_is_left_behind_for_the_next_request_of_the_connection() -> None:
    ids: list[str | None] = []
    traces: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ids.append(request_id_var.get())
        traces.append(trace.get_current_span().get_span_context().trace_id)

    leftover = trace.NonRecordingSpan(trace.SpanContext(trace_id=1, span_id=1, is_remote=False))
    with trace.use_span(leftover):  # what a reused context looks like
        token = request_id_var.set("of the request before")
        for _ in range(2):
            await call(app)
        assert request_id_var.get() == "of the request before"
        request_id_var.reset(token)
    assert len({"of the request before", *ids}) == 3
    assert traces == [0, 0]


async def test_the_servers_shared_state_is_not_written_to() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["state"] == {"pool": 1, "request_id": request_id_var.get()}

    shared = {"pool": 1}
    await call(app, state=shared)
    assert shared == {"pool": 1}
