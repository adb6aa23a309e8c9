"""Databases on a PostgreSQL server: their URLs, statements, migrations."""

import io
import os
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import asyncpg
from alembic.config import CommandLine, Config
from sqlalchemy import make_url

from devtools import ROOT


def with_database(url: str, name: str) -> str:
    """Return `url` with the database's name replaced."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def alembic_process(url: str, *arguments: str, clone: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run alembic as a user of a clone does: its own process, DATABASE_URL in the environment."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=clone,
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )


def run_alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run alembic's command line in this process, which takes a tenth of the time of another one."""
    out, err = io.StringIO(), io.StringIO()

    def run() -> Any:
        try:
            command = CommandLine()
            options = command.parser.parse_args(arguments)
            command.run_cmd(Config(ROOT / "alembic.ini", cmd_opts=options, stdout=out), options)
        except SystemExit as error:
            return error.code
        except Exception:  # noqa: BLE001 - what a process of its own would print
            traceback.print_exc()
            return 1
        return 0

    environment = patch.dict(os.environ, DATABASE_URL=url)
    # A thread of its own has no event loop yet, as a process of its own.
    with environment, redirect_stdout(out), redirect_stderr(err), ThreadPoolExecutor(1) as thread:
        code = thread.submit(run).result()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


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
