"""What a request is answered when something fails: 422, 500 and 503."""

import contextlib
import logging
from typing import Annotated, Any

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect, status
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from fastapi.websockets import WebSocketState
from opentelemetry import trace
from pydantic import BaseModel, Field

from backend.cc.errors import DatabaseUnavailableError, group_error

logger = logging.getLogger(__name__)


class Refusal(BaseModel):
    """What is wrong."""

    detail: str


class Failure(Refusal):
    """What is wrong, and for which request."""

    request_id: Annotated[str, Field(description="Also in the header X-Request-ID and in the service's log.")]


class Unavailable(Failure):
    """The database can't be used now."""

    record_id: Annotated[str | None, Field(description="The record whose outcome is unknown, if there is one.")]
    committed: Annotated[list[str], Field(description="The records of this request that are committed.")]


def add_exception_handlers(app: FastAPI) -> None:
    """Register the handlers on `app`."""
    app.add_exception_handler(RequestValidationError, invalid_request)  # type: ignore[arg-type]
    app.add_exception_handler(DatabaseUnavailableError, database_unavailable)  # type: ignore[arg-type]
    app.add_exception_handler(ExceptionGroup, task_group_failed)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, internal_error)


async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer 422 with what is wrong and where, and without the input itself, which may be a prompt."""
    problems = [{key: item[key] for key in ("type", "loc", "msg")} for item in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def task_group_failed(connection: HTTPConnection, group: Exception) -> JSONResponse | None:
    """Answer for the database's error if the errors of a `TaskGroup` are all the database's, else as for any other."""
    error = group_error(group) if isinstance(group, ExceptionGroup) else group
    if isinstance(error, DatabaseUnavailableError):
        return await database_unavailable(connection, error)
    if error is group:
        raise group
    raise error from None


async def internal_error(request: Request, error: Exception) -> JSONResponse:
    """Answer 500. The server logs the traceback; the span gets the exception's type and frames, without its text."""
    trace.get_current_span().record_exception(error)
    failure = {"detail": "Internal Server Error", "request_id": request.state.request_id}
    return JSONResponse(failure, status_code=500)


async def database_unavailable(connection: HTTPConnection, error: DatabaseUnavailableError) -> JSONResponse | None:
    """Answer 503: the request is not to blame, and a retry may help. Close a WebSocket that is open."""
    is_open = isinstance(connection, WebSocket) and connection.application_state is not WebSocketState.CONNECTING
    name = f"{connection.scope.get('method', 'WS')} {getattr(connection.scope.get('route'), 'path', '')}"
    logger.warning("%s: %s, %s", name, 1013 if is_open else 503, error)
    if isinstance(connection, WebSocket) and is_open:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it is closed already
            await connection.close(status.WS_1013_TRY_AGAIN_LATER)
        return None
    unavailable: dict[str, Any] = {
        "detail": "The database is unavailable.",
        "request_id": connection.state.request_id,
        "record_id": str(error.record_id) if error.record_id else None,
        "committed": [str(record_id) for record_id in error.committed],
    }
    return JSONResponse(unavailable, status_code=503, headers={"Retry-After": "5"})
