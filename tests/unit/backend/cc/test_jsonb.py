import json
import sys
from collections.abc import Iterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1


@pytest.fixture(params=[4300, 640])
def digits(request: pytest.FixtureRequest) -> Iterator[int]:
    """The interpreter's limit on the digits of an integer: the default, and the lowest that can be set."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(request.param)
    yield request.param
    sys.set_int_max_str_digits(before)


async def test_an_integer_of_more_digits_than_python_prints_is_stored_as_hexadecimal_text(
    session: AsyncSession, db: asyncpg.Connection, digits: int
) -> None:
    most, more, long = 10**digits - 1, 10**digits, 16**166_000 - 1
    payload = {"most": -most, "more": more, "long": long, "in": [{"long": -long}]}
    await log_l1(session, EventRecord("values", payload))
    await log_l1(session, EventRecord("keys", {long: "key"}))  # type: ignore[dict-item]
    rows = await db.fetch("SELECT event_type, payload FROM mem0_cc.event_log")
    assert {event_type: json.loads(payload) for event_type, payload in rows} == {
        "values": {"most": -most, "more": hex(more), "long": hex(long), "in": [{"long": hex(-long)}]},
        "keys": {hex(long): "key"},
    }
