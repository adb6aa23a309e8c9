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
from backend.cc.services.logging import TOKENS_MAX, EventRecord, InvalidRecordError, PromptRecord, current_trace_id


# It describes the body in the OpenAPI document; what reads the body is `_records` (docs/decisions/0008).
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


class Problem(BaseModel):
    """One thing that is wrong with a request. Never repeats the input: it may be a prompt."""

    type: Annotated[str, Field(description="The kind of problem.")]
    loc: Annotated[list[str | int], Field(description="Where it is: `body` or `header`, then the key.")]
    msg: Annotated[str, Field(description="What every right value is like.")]


class Invalid(BaseModel):
    """All that is wrong with a request."""

    detail: list[Problem]


class Unavailable(BaseModel):
    """What the service can't do now, and for which request."""

    detail: str
    request_id: Annotated[str, Field(description="Also in the header X-Request-ID and in the service's log.")]


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

_REQUEST_ID: Final = {"schema": {"type": "string"}, "description": "The request's id, on every answer."}

_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "Both records are committed.",
        "headers": {"X-Request-ID": _REQUEST_ID},
        "content": {
            "application/json": {
                "example": {
                    "request_id": "c96aaabf-7715-4ee4-a0bd-5993b3c3a494",
                    "trace_id": "01a2032cffd1d6b4349ffee3228f896d",
                    "prompt_trace_id": "01a2032c-ffd2-738c-b118-a0004aaacc28",
                    "event_log_id": "01a2032c-ffda-7e9b-b3c1-2f6c9a51d8e0",
                }
            }
        },
    },
    413: {
        "description": "The body is larger than `CC_MAX_BODY_BYTES`; nothing was written. Plain text where "
        "`Content-Length` says so beforehand, JSON where it turns out while the body arrives.",
        "headers": {"X-Request-ID": _REQUEST_ID},
        "content": {
            "text/plain": {"schema": {"type": "string"}, "example": "Content Too Large"},
            "application/json": {
                "schema": {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]},
                "example": {"detail": "Content Too Large"},
            },
        },
    },
    422: {
        "description": "The body is not a JSON object sent as `application/json`, or a value in it is out of bounds; "
        "nothing was written.",
        "headers": {"X-Request-ID": _REQUEST_ID},
        "model": Invalid,
        "content": {
            "application/json": {
                "example": {
                    "detail": [
                        {
                            "type": "value_error",
                            "loc": ["body", "tokens_in"],
                            "msg": f"tokens_in must be an integer of 0 to {TOKENS_MAX}",
                        }
                    ]
                }
            }
        },
    },
    503: {
        "description": "The database can't be written to now. The prompt may have been written already.",
        "headers": {
            "X-Request-ID": _REQUEST_ID,
            "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds after which to try again."},
        },
        "model": Unavailable,
        "content": {
            "application/json": {
                "example": {
                    "detail": "The database is unavailable.",
                    "request_id": "c96aaabf-7715-4ee4-a0bd-5993b3c3a494",
                }
            }
        },
    },
}

router = APIRouter(tags=["debug"])


async def json_object(request: Request) -> dict[str, Any]:
    """Return the request's body, a JSON object.

    FastAPI's own parsing answers 400 or 500 to some of what is not JSON (broken UTF-8, numbers of
    thousands of digits, lone surrogates in an error's input), and repeats the input in its errors.

    Raises:
        RequestValidationError: The body is not one.
        HTTPException: 400, which nobody reads: the client has left.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise _invalid(("header", "content-type"), "must be application/json")
    try:
        body = json.loads(await request.body())
    except ClientDisconnect:
        raise HTTPException(400) from None
    except (ValueError, RecursionError):
        # ValueError: not JSON, not UTF-8, or an integer past Python's limit for decimal digits.
        rule = "must be JSON in UTF-8, its integers of 4,300 digits at most, not nested too deeply"
        raise _invalid(("body",), rule) from None
    if not isinstance(body, dict):
        raise _invalid(("body",), "must be a JSON object")
    return body


@router.post(
    "/test-log",
    response_model=TestLogResponse,
    summary="Write one prompt and one event",
    responses=_ANSWERS,
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
            tokens_in=_integer(extra.pop("tokens_in", 0)),
            tokens_out=_integer(extra.pop("tokens_out", 0)),
        )
        event_type, payload = extra.pop("event_type", "test_log"), extra.pop("payload", {})
        event = EventRecord(event_type, payload)
        if extra.keys() & payload.keys():
            raise InvalidRecordError("payload", "must not repeat a key that stands beside it")
    except InvalidRecordError as error:
        raise _invalid(("body", error.field), str(error)) from None
    return prompt, EventRecord(event.event_type, {**payload, **extra}) if extra else event


def _integer(value: Any) -> Any:
    # JSON has one kind of number: to JSON Schema, and to callers whose language agrees, 12.0 is an integer.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _invalid(location: tuple[str, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": location, "msg": message}])
