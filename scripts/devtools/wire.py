"""What goes over the wire to PostgreSQL, counted: a proxy in front of its Unix socket or port."""

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import make_url

ROUND_TRIPS = frozenset({b"Q", b"S"})
"""Frontend messages after which a client waits for the server: Query and Sync (PostgreSQL manual, 54.7)."""


class Wire:
    """The frontend messages seen so far, by type."""

    def __init__(self) -> None:
        self.messages: Counter[bytes] = Counter()

    @property
    def round_trips(self) -> int:
        """How often the client has waited for the server."""
        return sum(self.messages[kind] for kind in ROUND_TRIPS)


@asynccontextmanager
async def counted(database_url: str) -> AsyncIterator[tuple[str, Wire]]:
    """Yield a URL that leads to `database_url` through a proxy, and what passes it.

    Args:
        database_url: A server on a Unix socket (`?host=DIRECTORY`) or on a TCP port without TLS.
    """
    url, wire = make_url(database_url), Wire()
    directory = url.query.get("host")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(directory, str):
            port = url.query.get("port", "5432")
            server_reader, server_writer = await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.{port}")
        else:
            server_reader, server_writer = await asyncio.open_connection(url.host, url.port or 5432)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_count(reader, server_writer, wire))
            tasks.create_task(_copy(server_reader, writer))

    with tempfile.TemporaryDirectory(prefix="wire-") as home:
        server = await asyncio.start_unix_server(serve, Path(home) / ".s.PGSQL.5432")
        query = {**url.query, "host": home, "port": "5432", "sslmode": "disable"}
        proxied = url.set(host=None, port=None, query=query)
        try:
            yield proxied.render_as_string(hide_password=False), wire
        finally:
            server.close()


async def _count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wire: Wire) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        startup = await reader.readexactly(4)
        writer.write(startup + await reader.readexactly(int.from_bytes(startup) - 4))
        while True:
            head = await reader.readexactly(5)
            wire.messages[head[:1]] += 1
            writer.write(head + await reader.readexactly(int.from_bytes(head[1:]) - 4))
    writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()
