from itertools import count

import pytest

from devtools.waiting import until


def test_the_first_true_value_is_returned() -> None:
    assert until(iter([0, 0, 3, 4]).__next__) == 3


def test_what_never_becomes_true_is_an_error_that_says_what_was_waited_for() -> None:
    numbers = count()
    with pytest.raises(TimeoutError, match="the moon is full: not within 0.05 s"):
        until(lambda: next(numbers) < 0, 0.05, "the moon is full")
    assert next(numbers) > 1
