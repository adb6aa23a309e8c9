"""One request, one id: the ASGI middleware that gives every request its id."""

import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from opentelemetry.context import Context, attach, detach
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid4

request_id_var: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
"""The id of the request being served in this context; None outside any request."""

_INBOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_RESPONSE_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


def generate_request_id() -> str:
    """Return a random request id: a UUID v4 (RFC 9562) in its usual 36-character form."""
    return str(uuid4())


def is_valid_request_id(value: str) -> bool:
    """Tell whether an inbound id is kept: 1 to 128 characters of `[A-Za-z0-9._-]`."""
    # fullmatch: `match` with `$` would let a trailing newline through, and with it a forged log line.
    return _INBOUND_ID.fullmatch(value) is not None


class RequestIDMiddleware:
    """Give every request an id, and every answer exactly one header that says it.

    Belongs outside everything else, the error handling and the tracing included, so that the 500
    of an unhandled exception carries the header and every span of the request can read the id.

    The id is in `request.state.request_id` and in `request_id_var`.

    Args:
        app: The ASGI application to wrap.
        header_name: The header to read the id from and to answer it in.
        generator: Makes an id where the request brings none that is kept.
        validator: Tells whether an inbound id is kept. One that is not kept is replaced, never refused:
            a caller's mistake in a tracing header is no reason to lose the request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        header_name: str = "X-Request-ID",
        generator: Callable[[], str] = generate_request_id,
        validator: Callable[[str], bool] = is_valid_request_id,
    ) -> None:
        # Named `app`: FastAPI and OpenTelemetry walk `.app` to find what is already instrumented,
        # and under another name each request gets two server spans.
        self.app = app
        self.header_name = header_name
        self.generator = generator
        self.validator = validator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        request_id = self._inbound_id(scope) or self.generator()
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def send_with_id(message: Message) -> None:
            if message["type"] in _RESPONSE_STARTS:
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[self.header_name] = request_id
            await send(message)

        # Servers may reuse one context for all requests of a connection (uvicorn #2167): without the
        # empty trace context a request could join the trace of the one before it, without the reset
        # inherit its id.
        trace_token = attach(Context())
        id_token = request_id_var.set(request_id)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            request_id_var.reset(id_token)
            detach(trace_token)

    def _inbound_id(self, scope: Scope) -> str | None:
        # Two headers of this name are one too many: which of them is meant, nobody can tell.
        values = Headers(scope=scope).getlist(self.header_name)
        return values[0] if len(values) == 1 and self.validator(values[0]) else None
