"""Fixtures of the tests of bad input: one service for all of them, and its database to look into."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from devtools.service import running_service
from support.abuse import Abused
from support.database import execute, with_database


@pytest.fixture(scope="session")
def abused(postgres_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Abused]:
    """A running service with a database of its own. Its log must stay free of errors."""
    name = f"test_{uuid4().hex}"
    url = with_database(postgres_url, name)
    log: Path = tmp_path_factory.mktemp("abused") / "service.log"
    asyncio.run(execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template}"))
    with asyncio.Runner() as runner, running_service(url, log, "--no-access-log") as service:
        database = runner.run(asyncpg.connect(url))
        yield Abused(service, runner, database)
        runner.run(database.close())
        service.stop()
        assert "Traceback" not in service.log
        assert "ERROR" not in service.log
    asyncio.run(execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))
