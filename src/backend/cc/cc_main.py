"""The cc service, wired: log lines, tracing, the application, and the request id around it all."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from opentelemetry.sdk.trace import SpanProcessor
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import Lifespan, Receive, Scope, Send

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.exception_handlers import add_exception_handlers
from backend.cc.routers import debug_router
from common.log_lines import configure_logging
from common.logger_logfire import configure_logfire, flush_logfire
from common.request_id_middleware import RequestIDMiddleware

SHUTDOWN_SECONDS: Final = 3.0  # how long shutdown waits for spans to be delivered
# FastAPI's own: one span for each request. Operation spans would be three more, metrics and logs are not asked for.
_TRACING: Final = {"tracing": True, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}

logger = logging.getLogger(__name__)


class Service(FastAPI):
    """A FastAPI application inside `RequestIDMiddleware`, tracing and error handling included (docs/decisions/0003).

    `DBSession` and `LogL1` find its `database` in `request.state`, which applications that are mounted on it share.
    """

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(**options)
        self.database = database
        self._outermost = RequestIDMiddleware(super().__call__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":  # whose state is the server's own
            scope["state"] = {**scope.get("state", {}), "database": self.database}
        await self._outermost(scope, receive, send)


def create_app(
    settings: Settings, *, lifespan: Lifespan[Any] | None = None, span_processors: Sequence[SpanProcessor] = ()
) -> Service:
    """Return the service.

    Args:
        settings: Its configuration.
        lifespan: FastAPI's, for what starts and ends with your own code. It runs inside the service's.
        span_processors: More of OpenTelemetry's, e.g. a test's exporter.
    """
    configure_logging("backend", "common")
    configure_logfire("cos-cc", span_processors=span_processors, **settings.tracing())
    app = Service(
        Database(settings),
        title="COS Control Center",
        lifespan=partial(_lifespan, lifespan),
        telemetry=_TRACING,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    # Once. FastAPI's own `max_body_size` is checked by the application, by the router and by the route.
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.cc_max_body_bytes)
    add_exception_handlers(app)
    if settings.cc_debug_routes:
        app.include_router(debug_router.router)
    return app


@contextlib.asynccontextmanager
async def _lifespan(inner: Lifespan[Any] | None, app: Service) -> AsyncIterator[Any]:
    """Start and end, around a lifespan of your own. It connects to nothing: the service starts without its database."""
    # Objects made at start-up live as long as the process. `gc.freeze` keeps the collector from walking them again
    # under load, a pause of tens of milliseconds.
    gc.collect()
    gc.freeze()
    try:
        async with inner(app) if inner else contextlib.nullcontext() as state:
            yield state
    finally:
        await app.database.aclose()
        if not await asyncio.to_thread(flush_logfire, SHUTDOWN_SECONDS):
            logger.warning("Some spans could not be delivered within %s s.", SHUTDOWN_SECONDS)


app = create_app(Settings())
