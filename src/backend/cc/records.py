"""The records that `log_l1` takes, and the rules that each must keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from backend.cc.mem0_models import NAME_LENGTH

CONTENT_MAX: Final = 2**28 - 2**11  # characters: 1 GB if each has four bytes, PostgreSQL's limit for a message
TOKENS_MAX: Final = 2**31 - 1  # PostgreSQL's `integer`


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One message of a conversation with a model. A field that breaks its rule is a ValueError, which names both.

    Args:
        role: The speaker, e.g. "user" or "assistant": 1 to 255 characters.
        content: The text, at most 268,433,408 characters, which PostgreSQL can always store; may be empty.
        tokens_in: Tokens that the model read, 0 to 2,147,483,647.
        tokens_out: Tokens that the model wrote, 0 to 2,147,483,647.
    """

    role: str
    content: str
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        check_name("role", self.role)
        if not isinstance(self.content, str) or len(self.content) > CONTENT_MAX:
            raise ValueError(f"content must be a string of at most {CONTENT_MAX} characters")
        for field, value in (("tokens_in", self.tokens_in), ("tokens_out", self.tokens_out)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= TOKENS_MAX:
                raise ValueError(f"{field} must be an integer of 0 to {TOKENS_MAX}")


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event of the system. A field that breaks its rule is a ValueError, which names both.

    Args:
        event_type: The kind of event, e.g. "tool.called": 1 to 255 characters. Spans carry it: no content in here.
        payload: The event's data, stored as JSON; see `jsonb.to_jsonb` for values that JSON can't express.
    """

    event_type: str
    payload: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_name("event_type", self.event_type)
        if not isinstance(self.payload, Mapping):
            raise ValueError("payload must be a mapping")


Record = PromptRecord | EventRecord


def check_name(field: str, value: str) -> None:
    """Raise a ValueError that names `field`, not its value, unless it is a string of 1 to 255 characters."""
    if not isinstance(value, str) or not 0 < len(value) <= NAME_LENGTH:
        raise ValueError(f"{field} must be a string of 1 to {NAME_LENGTH} characters")
