"""The one way to wait for something: look again and again, for a bounded time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 15, what: str = "what was waited for") -> T:
    """Wait until a condition is true.

    Args:
        condition: Called every 20 milliseconds.
        seconds: How long to wait at most. The condition is called at least once.
        what: What the condition says, for the error: `"the service listens"`.

    Returns:
        The first true value that the condition returned.

    Raises:
        TimeoutError: The condition was never true.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return found
