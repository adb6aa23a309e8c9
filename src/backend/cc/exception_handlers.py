"""What a request is answered when something fails: 422, 500 and 503."""

import contextlib
import logging
from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect, status
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from fastapi.websockets import WebSocketState
from opentelemetry import trace
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError

from backend.cc.errors import DatabaseUnavailableError, database_error

logger = logging.getLogger(__name__)


class Refusal(BaseModel):
    """What is wrong."""

    detail: str


class Failure(Refusal):
    """What is wrong, and for which request."""

    request_id: Annotated[str, Field(description="Also in the header X-Request-ID and in the service's log.")]


class Unavailable(Failure):
    """The database can't be used now."""

    record_id: Annotated[UUID | None, Field(description="The record whose outcome is unknown, if there is one.")]


def add_exception_handlers(app: FastAPI) -> None:
    """Register the handlers on `app`."""
    app.add_exception_handler(RequestValidationError, invalid_request)  # type: ignore[arg-type]
    app.add_exception_handler(DatabaseUnavailableError, database_unavailable)  # type: ignore[arg-type]
    app.add_exception_handler(SQLAlchemyError, database_unavailable)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, internal_error)


async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer 422 with what is wrong and where, and without the input itself, which may be a prompt."""
    problems = [{key: item[key] for key in ("type", "loc", "msg")} for item in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def internal_error(request: Request, error: Exception) -> JSONResponse:
    """Answer 500. The server logs the traceback; the span gets the exception's type and frames, without its text."""
    trace.get_current_span().record_exception(error)
    return JSONResponse({"detail": "Internal Server Error", "request_id": request.state.request_id}, status_code=500)


async def database_unavailable(
    connection: HTTPConnection, error: DatabaseUnavailableError | SQLAlchemyError
) -> JSONResponse | None:
    """Answer 503 if a retry may help; close a WebSocket that is open. What else failed in your own query is a 500."""
    meaning = database_error(error)
    if not isinstance(meaning, DatabaseUnavailableError):
        raise error
    path = getattr(connection.scope.get("route"), "path", "")
    logger.warning("%s %s: 503, %s", connection.scope.get("method", "WS"), path, meaning)
    if isinstance(connection, WebSocket) and connection.application_state is not WebSocketState.CONNECTING:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it is closed already
            await connection.close(status.WS_1013_TRY_AGAIN_LATER)
        return None
    answer = Unavailable(
        detail="The database is unavailable.", request_id=connection.state.request_id, record_id=meaning.record_id
    )
    return JSONResponse(answer.model_dump(mode="json"), status_code=503, headers={"Retry-After": "5"})
