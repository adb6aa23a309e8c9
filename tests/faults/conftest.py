"""Fixtures of the fault tests: a PostgreSQL to break, and the service on it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from devtools.postgres import Server, temporary_home
from devtools.service import Service, running_service
from support.cluster import TIMEOUT, Postgres, Run, fetch
from support.database import run_alembic, with_database


@pytest.fixture(scope="session")
def cluster() -> Iterator[Postgres]:
    """The PostgreSQL."""
    with temporary_home() as home:
        postgres = Postgres(Server(home))
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.heal()
            postgres.stop()


@pytest.fixture
def postgres(cluster: Postgres) -> Iterator[Postgres]:
    """The same, whole again after the test."""
    yield cluster
    cluster.heal()


@pytest.fixture(scope="session")
def database_url(cluster: Postgres) -> str:
    """A database in it. Shared: what a test changes there, it changes back."""
    name = f"test_{uuid4().hex}"
    fetch(cluster.url, f"CREATE DATABASE {name}")
    url = with_database(cluster.url, name)
    run_alembic(url, "upgrade", "head").check_returncode()
    return url


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Run:
    """Start a service there. What it prints is in `service.log`."""
    log_path = tmp_path / "service.log"
    return partial(running_service, database_url, log_path, "--no-access-log", CC_DB_TIMEOUT_SECONDS=str(TIMEOUT))


@pytest.fixture(scope="session")
def service(cluster: Postgres, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service there that outlives the faults of all tests: each begins with proof that it has recovered."""
    log_path = tmp_path_factory.mktemp("faults") / "service.log"
    arguments = ("--no-access-log", "--app-dir=tests")
    with running_service(
        database_url, log_path, *arguments, app="support.endpoints:app", CC_DB_TIMEOUT_SECONDS=str(TIMEOUT)
    ) as service:
        yield service
