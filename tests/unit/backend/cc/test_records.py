from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest

from backend.cc import jsonb
from backend.cc.jsonb import clean_text
from backend.cc.records import EventRecord, PromptRecord, Record


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: PromptRecord("", "x"), "role"),
        (lambda: PromptRecord("r" * 256, "x"), "role"),
        (lambda: PromptRecord(None, "x"), "role"),  # type: ignore[arg-type]
        (lambda: PromptRecord("user", b"x"), "content"),  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("character", "most"), [("x", 12), ("é", 6), ("😀", 3), ("\0", 4), ("\ud800", 4)])
def test_the_longest_prompt_is_counted_in_bytes_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, character: str, most: int
) -> None:
    monkeypatch.setattr(jsonb, "BYTES_MAX", 12)
    assert len(clean_text(character * most).encode()) == 12
    PromptRecord("user", character * most)
    with pytest.raises(ValueError, match="^content must be a string of at most 1 GB"):
        PromptRecord("user", character * (most + 1))


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PromptRecord("user", "x").role = "assistant"  # type: ignore[misc]
