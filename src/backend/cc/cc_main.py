"""The cc service, wired: tracing, then the application, then the request id around it all."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Final

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect, status
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from fastapi.websockets import WebSocketState
from opentelemetry.sdk.trace import SpanProcessor

from backend.cc.deps import Settings, configure_tracing, create_sessions
from backend.cc.routers import debug_router
from backend.cc.services.logging import DatabaseUnavailableError
from common.logger_logfire import flush_logfire, instrument_fastapi
from common.request_id_middleware import RequestIDMiddleware

SERVICE_NAME: Final = "cos-cc"
"""The OpenTelemetry `service.name`."""

SHUTDOWN_SECONDS: Final = 3.0
"""Seconds that shutdown waits for the database connections to close, and as long again for spans."""

logger = logging.getLogger(__name__)


def create_app(settings: Settings, *, span_processors: Sequence[SpanProcessor] = ()) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        settings: Its configuration.
        span_processors: More OpenTelemetry span processors, e.g. a test's exporter.
    """
    configure_tracing(settings, SERVICE_NAME, span_processors=span_processors)
    app = FastAPI(
        title="COS Control Center",
        lifespan=lifespan,
        max_body_size=settings.cc_max_body_bytes,
        # FastAPI traces by itself once a tracer is configured: each request would have two server spans.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.sessions = create_sessions(settings)
    app.add_exception_handler(DatabaseUnavailableError, database_unavailable)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid_request)  # type: ignore[arg-type]
    if settings.cc_debug_routes:
        app.include_router(debug_router.router)
    instrument_fastapi(app)
    # Around the finished stack, not `add_middleware`: that puts it inside the error handling and the
    # tracing, and a 500 would have no id.
    build_inner_stack = app.build_middleware_stack
    app.build_middleware_stack = lambda: RequestIDMiddleware(build_inner_stack())  # type: ignore[method-assign]
    return app


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start and end with the process. Connects to nothing: the service starts without its database."""
    # What start-up made lives as long as the process. Out of the collector's sight it is not walked
    # through again under load, which stalls the event loop by tens of milliseconds.
    gc.collect()
    gc.freeze()
    yield
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SHUTDOWN_SECONDS):
            await app.state.sessions.kw["bind"].dispose()
    if not await asyncio.to_thread(flush_logfire, SHUTDOWN_SECONDS):
        logger.warning("Some spans could not be delivered within %s s.", SHUTDOWN_SECONDS)


async def database_unavailable(connection: HTTPConnection, error: Exception) -> JSONResponse | None:
    """Answer 503: nothing is wrong with the request, and trying again soon may help. Close a WebSocket that is open."""
    request_id = connection.state.request_id
    logger.warning("%s %s: %s", connection.scope.get("method", "WebSocket"), request_id, error)
    if isinstance(connection, WebSocket) and connection.application_state is not WebSocketState.CONNECTING:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # closed already
            await connection.close(status.WS_1013_TRY_AGAIN_LATER)
        return None
    return JSONResponse(
        {"detail": "The database is unavailable.", "request_id": request_id},
        status_code=503,
        headers={"Retry-After": "5"},
    )


async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer 422 with what is wrong and where, and without the input itself."""
    return JSONResponse(
        {"detail": [{key: item[key] for key in ("type", "loc", "msg")} for item in error.errors()]}, status_code=422
    )


app = create_app(Settings())
