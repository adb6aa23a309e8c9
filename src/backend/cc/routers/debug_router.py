"""`POST /test-log`: one prompt and one event through `log_l1`, to see that everything works."""

import json
from typing import Annotated, Any, Final

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from backend.cc.deps import LogL1
from backend.cc.mem0_models import NAME_LENGTH
from backend.cc.services.logging import TOKENS_MAX, EventRecord, InvalidRecord, PromptRecord, current_trace_id


class TestLogRequest(BaseModel):
    """Any JSON object. Every key is optional; keys not named here are kept in the event's payload."""

    __test__ = False  # not a test, whatever pytest makes of the name

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH, description="Who speaks.")] = "user"
    content: Annotated[str, Field(description="The text of the prompt.")] = ""
    tokens_in: Annotated[int, Field(ge=0, le=TOKENS_MAX, description="Tokens that the model read.")] = 0
    tokens_out: Annotated[int, Field(ge=0, le=TOKENS_MAX, description="Tokens that the model wrote.")] = 0
    event_type: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH, description="The event's kind.")] = (
        "test_log"
    )
    payload: Annotated[dict[str, Any], Field(description="What belongs to the event.")] = {}


class TestLogResponse(BaseModel):
    """Where to find what was written: two committed records, one request, one trace."""

    __test__ = False

    request_id: Annotated[str, Field(description="Also in the header X-Request-ID and on every span.")]
    trace_id: Annotated[str, Field(description="The trace's id, 32 hexadecimal digits.")]
    prompt_trace_id: Annotated[str, Field(description="The prompt's `base_log_id`, a UUIDv7.")]
    event_log_id: Annotated[str, Field(description="The event's `base_log_id`, a UUIDv7.")]


_EXAMPLES: Final = {
    "message": {"summary": "Anything", "value": {"message": "hello"}},
    "full": {
        "summary": "Every key",
        "value": {
            "role": "assistant",
            "content": "Paris is the capital of France.",
            "tokens_in": 12,
            "tokens_out": 7,
            "event_type": "model.answered",
            "payload": {"model": "small", "cached": False},
        },
    },
}

router = APIRouter(tags=["debug"])


async def json_object(request: Request) -> dict[str, Any]:
    """Return the request's body, a JSON object.

    FastAPI's own parsing answers 400 or 500 to some of what is not JSON (broken UTF-8, numbers of
    thousands of digits, lone surrogates in an error's input), and repeats the input in its errors.

    Raises:
        RequestValidationError: It is none.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise _invalid(("header", "content-type"), "must be application/json")
    try:
        body = json.loads(await request.body())
    except ClientDisconnect:
        raise HTTPException(400) from None  # nobody is left to read it
    except (ValueError, RecursionError):
        # ValueError: not JSON, not UTF-8, or a number past Python's limit for decimal digits.
        rule = "must be JSON in UTF-8, its numbers below 4,300 digits, not nested too deeply"
        raise _invalid(("body",), rule) from None
    if not isinstance(body, dict):
        raise _invalid(("body",), "must be a JSON object")
    return body


@router.post(
    "/test-log",
    response_model=TestLogResponse,
    summary="Write one prompt and one event",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": TestLogRequest.model_json_schema(), "examples": _EXAMPLES}},
        }
    },
)
async def test_log(request: Request, log_l1: LogL1) -> JSONResponse:
    """Write a prompt and an event to L1 memory, each with its base row, and say their ids.

    Both are committed when the answer arrives. For trying out: turn it off (`CC_DEBUG_ROUTES=false`)
    where the service can be reached by others.
    """
    prompt, event = _records(await json_object(request))
    prompt_trace_id = await log_l1(prompt)
    event_log_id = await log_l1(event)
    return JSONResponse(
        {
            "request_id": request.state.request_id,
            "trace_id": current_trace_id(),
            "prompt_trace_id": str(prompt_trace_id),
            "event_log_id": str(event_log_id),
        }
    )


test_log.__test__ = False  # type: ignore[attr-defined]


def _records(body: dict[str, Any]) -> tuple[PromptRecord, EventRecord]:
    """Build both records before either is written: a refused body leaves nothing."""
    extra = dict(body)
    try:
        prompt = PromptRecord(
            role=extra.pop("role", "user"),
            content=extra.pop("content", ""),
            tokens_in=extra.pop("tokens_in", 0),
            tokens_out=extra.pop("tokens_out", 0),
        )
        event_type, payload = extra.pop("event_type", "test_log"), extra.pop("payload", {})
        event = EventRecord(event_type, payload)
        if extra.keys() & payload.keys():
            raise InvalidRecord("payload", "must not repeat a key that stands beside it")
    except InvalidRecord as error:
        raise _invalid(("body", error.field), str(error)) from None
    return prompt, EventRecord(event.event_type, {**payload, **extra}) if extra else event


def _invalid(location: tuple[str, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": location, "msg": message}])
