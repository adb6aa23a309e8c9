from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest

from backend.cc.records import CONTENT_MAX, EventRecord, PromptRecord, Record


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: PromptRecord("", "x"), "role"),
        (lambda: PromptRecord("r" * 256, "x"), "role"),
        (lambda: PromptRecord(None, "x"), "role"),  # type: ignore[arg-type]
        (lambda: PromptRecord("user", b"x"), "content"),  # type: ignore[arg-type]
        (lambda: PromptRecord("user", "x" * (CONTENT_MAX + 1)), "content"),
        (lambda: PromptRecord("user", "x", tokens_in=-1), "tokens_in"),
        (lambda: PromptRecord("user", "x", tokens_in=2**31), "tokens_in"),
        (lambda: PromptRecord("user", "x", tokens_out=-1), "tokens_out"),
        (lambda: PromptRecord("user", "x", tokens_out=1.0), "tokens_out"),  # type: ignore[arg-type]
        (lambda: PromptRecord("user", "x", tokens_out=True), "tokens_out"),
        (lambda: EventRecord("", {}), "event_type"),
        (lambda: EventRecord("e" * 256, {}), "event_type"),
        (lambda: EventRecord("e", [1]), "payload"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_record_is_a_value_error_that_names_the_field(build: Callable[[], Record], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be "):
        build()


def test_the_bounds_themselves_are_right() -> None:
    PromptRecord("r" * 255, "", tokens_in=0, tokens_out=2**31 - 1)
    EventRecord("e" * 255, {})


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PromptRecord("user", "x").role = "assistant"  # type: ignore[misc]
