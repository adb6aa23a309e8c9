import time

import asyncpg
import pytest

from support.wire import counted


@pytest.mark.parametrize("statements", [1, 3])
async def test_round_trips_are_counted_and_can_be_delayed(postgres_url: str, statements: int) -> None:
    with counted(postgres_url, delay=0.01) as wire:
        connection = await asyncpg.connect(wire.url)
        before, started = wire.round_trips, time.monotonic()
        for _ in range(statements):
            await connection.execute("SELECT 1")
        assert time.monotonic() - started >= 0.01 * statements
        assert wire.round_trips - before == statements
        await connection.close()


async def test_a_connection_that_the_server_ends_is_ended_for_the_client_too(postgres_url: str) -> None:
    with counted(postgres_url) as wire:
        connection = await asyncpg.connect(wire.url)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        await connection.close()
