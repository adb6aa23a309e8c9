import asyncio
import json
import os
import subprocess
import sys

import asyncpg
import pytest

from devtools import ROOT

LOG = """
import asyncio, os
from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1

long, short = 16 ** 166_000 - 1, 10 ** 4300 - 1
payload = {"long": long, "negative": -long, "in": [{"long": long}], "short": short}

async def main():
    async with Database(Settings()) as database, database.session() as session:
        await log_l1(session, EventRecord("values", payload))
        await log_l1(session, EventRecord("keys", {long: "key"}))

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("limit", "short"),
    [("", 10**4300 - 1), ("640", hex(10**4300 - 1))],
    ids=["default", "640"],
)
async def test_an_integer_of_200000_digits_is_stored_as_hexadecimal_text_whatever_the_interpreters_limit(
    database_url: str, db: asyncpg.Connection, limit: str, short: int | str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "DATABASE_URL": database_url}
    if limit:
        environment["PYTHONINTMAXSTRDIGITS"] = limit
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", LOG], env=environment, check=True)
    rows = await db.fetch("SELECT event_type, payload FROM mem0_cc.event_log")
    long = "0x" + "f" * 166_000
    assert {event_type: json.loads(payload) for event_type, payload in rows} == {
        "values": {"long": long, "negative": f"-{long}", "in": [{"long": long}], "short": short},
        "keys": {long: "key"},
    }
