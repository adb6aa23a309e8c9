"""`POST /test-log`: one prompt and one event through `log_l1`, to see that everything works."""

from typing import Annotated, Any, Final, Self
from uuid import UUID

from fastapi import APIRouter, Request
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field, model_validator

from backend.cc.deps import LogL1
from backend.cc.exception_handlers import Failure, Refusal, Unavailable
from backend.cc.mem0_models import NAME_LENGTH
from backend.cc.records import TOKENS_MAX, EventRecord, PromptRecord

Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH)]
Tokens = Annotated[int, Field(ge=0, le=TOKENS_MAX)]


class TestLogRequest(BaseModel):
    """Any JSON object. Every key is optional; keys not named here become keys of the event's payload."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[Name, Field(description="The speaker.", examples=["assistant"])] = "user"
    content: Annotated[str, Field(description="The prompt's text.", examples=["Paris is in France."])] = ""
    tokens_in: Annotated[Tokens, Field(description="Tokens that the model read.", examples=[12])] = 0
    tokens_out: Annotated[Tokens, Field(description="Tokens that the model wrote.", examples=[7])] = 0
    event_type: Annotated[Name, Field(description="The kind of event.", examples=["model.answered"])] = "test_log"
    payload: Annotated[dict[str, Any], Field(description="The event's data.", examples=[{"model": "small"}])] = {}

    @model_validator(mode="after")
    def _no_key_twice(self) -> Self:
        if self.payload.keys() & (self.model_extra or {}).keys():
            raise ValueError("payload must not repeat a key that stands beside it")
        return self


class TestLogResponse(BaseModel):
    """Where to find what was written: two committed records, one request, one trace."""

    request_id: str
    trace_id: str
    prompt_trace_id: UUID
    event_log_id: UUID


_ID: Final = {"X-Request-ID": {"schema": {"type": "string"}, "description": "The request's id."}}
_RETRY_AFTER: Final = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until a retry may help."}}
_TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}  # where `Content-Length` announced the size; else JSON
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"headers": _ID, "description": "Both records are committed."},
    400: {"headers": _ID, "description": "The body can't be read as JSON; nothing was written.", "model": Refusal},
    413: {"headers": _ID, "description": "Above `CC_MAX_BODY_BYTES`.", "model": Refusal, "content": _TEXT},
    500: {"headers": _ID, "description": "A defect, or a missing migration.", "model": Failure},
    503: {"headers": _ID | _RETRY_AFTER, "description": "The database can't be written to.", "model": Unavailable},
}
router = APIRouter(tags=["debug"])


@router.post("/test-log", summary="Write one prompt and one event", responses=_ANSWERS)
async def test_log(body: TestLogRequest, request: Request, log_l1: LogL1) -> TestLogResponse:
    """Write a prompt and an event to L1 memory, each with its base row, and return their ids.

    Both are committed when the answer arrives. Where others can reach the service, set `CC_DEBUG_ROUTES=false`.
    """
    prompt_id = await log_l1(PromptRecord(body.role, body.content, body.tokens_in, body.tokens_out))
    event_id = await log_l1(EventRecord(body.event_type, body.payload | (body.model_extra or {})))
    trace_id = trace.format_trace_id(trace.get_current_span().get_span_context().trace_id)
    return TestLogResponse(
        request_id=request.state.request_id, trace_id=trace_id, prompt_trace_id=prompt_id, event_log_id=event_id
    )
