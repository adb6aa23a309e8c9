"""One request, one id: the ASGI middleware that gives every request its id."""

import re
from contextvars import ContextVar
from typing import Final

from opentelemetry.context import Context, attach, detach
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid4

HEADER: Final = b"x-request-id"
NOTE: Final = "request id: "  # of an exception, followed by the id
request_id_var: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
"""The id of the request being served in this context; None outside any request."""

_INBOUND_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_RESPONSE_STARTS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


def generate_request_id() -> str:
    """Return a random request id: a UUID v4 (RFC 9562) in its usual 36-character form."""
    return str(uuid4())


class RequestIDMiddleware:
    """Give every request an id, and every response exactly one `X-Request-ID` header with it.

    The middleware belongs outside everything else, error handling and tracing included. Only there does the 500 of
    an unhandled exception carry the header, and can the first span of a request read the id.

    The id is in `request.state.request_id` and in `request_id_var`. An inbound id of 1 to 128 characters of
    `[A-Za-z0-9._-]` is kept. Any other is replaced, never refused: a mistake in a tracing header is no reason to lose
    the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        # Of two headers with this name neither is known to be the caller's, so both are ignored. `fullmatch`, because
        # `match` with `$` would let a trailing newline through, and with it a forged log line.
        inbound = [value for name, value in scope["headers"] if name == HEADER]
        is_valid = len(inbound) == 1 and _INBOUND_ID.fullmatch(inbound[0])
        request_id = inbound[0].decode() if is_valid else generate_request_id()
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def send_with_id(message: Message) -> None:
            if message["type"] in _RESPONSE_STARTS:
                others = [header for header in message.get("headers", ()) if header[0].lower() != HEADER]
                message["headers"] = [*others, (HEADER, request_id.encode())]
            await send(message)

        # A server may reuse one context for all requests of a connection (uvicorn #2167). The empty trace context
        # keeps a request out of the trace of the request before it, and the reset keeps it from inheriting the id.
        trace_token = attach(Context())
        id_token = request_id_var.set(request_id)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            # The server logs the traceback after this middleware has ended, so the id must be part of the exception.
            error.add_note(NOTE + request_id)
            raise
        finally:
            request_id_var.reset(id_token)
            detach(trace_token)
