"""The records that `log_l1` takes, and the rules that each must keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from backend.cc.mem0_models import NAME_LENGTH

TOKENS_MAX: Final = 2**31 - 1
"""The largest token count: PostgreSQL's `integer`."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One message of a conversation with a model.

    Args:
        role: The speaker, e.g. "user" or "assistant": 1 to 255 characters.
        content: The text, of any length that PostgreSQL takes (1 GB); may be empty.
        tokens_in: Tokens that the model read, 0 to 2,147,483,647.
        tokens_out: Tokens that the model wrote, 0 to 2,147,483,647.

    Raises:
        ValueError: A field breaks its rule. The message names both.
    """

    role: str
    content: str
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        check_name("role", self.role)
        _require(isinstance(self.content, str), "content must be a string")
        for field, value in (("tokens_in", self.tokens_in), ("tokens_out", self.tokens_out)):
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            _require(is_integer and 0 <= value <= TOKENS_MAX, f"{field} must be an integer of 0 to {TOKENS_MAX}")


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event of the system.

    Args:
        event_type: The kind of event, e.g. "tool.called": 1 to 255 characters. Spans carry it: no content in here.
        payload: The event's data, stored as JSON; see `jsonb.to_jsonb` for values that JSON can't express.

    Raises:
        ValueError: A field breaks its rule. The message names both.
    """

    event_type: str
    payload: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_name("event_type", self.event_type)
        _require(isinstance(self.payload, Mapping), "payload must be a mapping")


Record = PromptRecord | EventRecord


def check_name(field: str, value: str) -> None:
    """Raise a ValueError that names `field` unless `value` is a string of 1 to 255 characters."""
    is_name = isinstance(value, str) and 0 < len(value) <= NAME_LENGTH
    _require(is_name, f"{field} must be a string of 1 to {NAME_LENGTH} characters")


def _require(fulfilled: bool, rule: str) -> None:  # noqa: FBT001
    if not fulfilled:
        raise ValueError(rule)  # without the value, which may be a prompt
