"""Databases on a PostgreSQL server: their URLs, statements, migrations."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import make_url

from devtools import ROOT


def with_database(url: str, name: str) -> str:
    """Return `url` with the database's name replaced."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def run_alembic(url: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run alembic as a user does: its own process, DATABASE_URL in the environment."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *args],
        cwd=ROOT,
        # Without Logfire's plugin of pydantic, which is a third of the time and does nothing here.
        env={**os.environ, "DATABASE_URL": url, "PYDANTIC_DISABLE_PLUGINS": "__all__"},
        capture_output=True,
        text=True,
        check=False,
    )


def migrate(url: str) -> None:
    """Make the schema in an empty database, in this process, which takes a tenth of the time of another one."""
    before = os.environ["DATABASE_URL"]
    os.environ["DATABASE_URL"] = url
    try:
        command.upgrade(Config(ROOT / "alembic.ini", ROOT / "pyproject.toml"), "head")
    finally:
        os.environ["DATABASE_URL"] = before


async def execute(url: str, *statements: str) -> None:
    """Run statements one after the other, each in its own transaction."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def new_database(server_url: str, options: str = "") -> AsyncIterator[str]:
    """Create a database, with the options of CREATE DATABASE, and drop it at the end. Yields its URL."""
    name = f"test_{uuid4().hex}"
    await execute(server_url, f"CREATE DATABASE {name} {options}")
    try:
        yield with_database(server_url, name)
    finally:
        await execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")
