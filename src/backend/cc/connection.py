"""One connection to PostgreSQL, for the writer, for sessions and for migrations."""

from typing import Any

import asyncpg

from backend.cc.config import Settings
from backend.cc.errors import ConnectError


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        tag: str = await super().execute(query, *args, **options)
        if tag == "ROLLBACK" and query.startswith("COMMIT"):
            # A statement of the transaction has failed before. asyncpg doesn't look at this answer.
            raise asyncpg.InFailedSQLTransactionError("rolled back instead of committed")
        return tag


async def connect(settings: Settings, seconds: float, *, command_timeout: float | None = None) -> asyncpg.Connection:
    """Connect to `DATABASE_URL` within so many seconds.

    Raises:
        asyncpg.PostgresError: The server refused, or no server could be reached (`ConnectError`).
    """
    url = settings.database_url.get_secret_value()
    limits = {"timeout": seconds, "command_timeout": command_timeout}
    try:
        return await asyncpg.connect(url, connection_class=_Connection, **limits)
    except asyncpg.PostgresError:
        raise
    except Exception as error:  # noqa: BLE001 - a peer with another protocol can make asyncpg raise anything
        name = type(error).__name__
    # SQLAlchemy wraps only PostgreSQL's errors. Outside of the `except`: the original's text has the address.
    raise ConnectError(name)
