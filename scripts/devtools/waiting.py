"""The one way to wait for something: look again and again, for a bounded time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 15, what: str = "what was waited for") -> T:
    """Call a condition every 20 milliseconds, and return the first true value that it returns.

    Raises:
        TimeoutError: No true value was returned within `seconds`. The message has `what`, the condition in words.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return found
