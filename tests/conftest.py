"""A real PostgreSQL with the migrated schema for every test, and the real service around it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import asyncpg
import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from devtools import ROOT
from devtools.postgres import server, temporary_home
from support.database import execute, new_database, run_alembic, with_database

# In a run that was started with SIGINT ignored, as `&` in a script does, a child would inherit that, and a test that
# interrupts its child would wait for ever. A signal that has a handler here is reset to its default in a child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports cc_main, whose last line builds the service from the environment: tests build
# their own, nothing is sent anywhere, and no developer's settings shine through.
for name in list(os.environ):
    if name.startswith(("LOGFIRE_", "OTEL_", "CC_")) and not name.startswith(("CC_TEST_", "CC_SOAK_")):
        del os.environ[name]
os.environ["DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/nothing"

from backend.cc.cc_main import Service, create_app  # noqa: E402
from backend.cc.config import Settings  # noqa: E402
from backend.cc.database import Database  # noqa: E402
from support.clients import client_of  # noqa: E402


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The server that the tests of a process share: CC_TEST_DATABASE_URL, or an embedded one that is thrown away."""
    if url := os.environ.get("CC_TEST_DATABASE_URL"):
        yield make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        return
    with temporary_home() as home, server(home) as url:
        yield url


@pytest.fixture(scope="session")
def template(postgres_url: str) -> Iterator[str]:
    """The name of a database made by the real migrations, to be cloned."""
    name = f"template_{uuid4().hex}"
    asyncio.run(execute(postgres_url, f"CREATE DATABASE {name}"))
    run_alembic(with_database(postgres_url, name), "upgrade", "head").check_returncode()
    yield name
    asyncio.run(execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def database_url(postgres_url: str, template: str) -> AsyncIterator[str]:
    """A database of the test's own, with the migrated schema: commits are real."""
    async with new_database(postgres_url, f"TEMPLATE {template}") as url:
        yield url


@pytest.fixture
async def empty_database_url(postgres_url: str) -> AsyncIterator[str]:
    """A database with nothing in it."""
    async with new_database(postgres_url) as url:
        yield url


@pytest.fixture
def role_urls(postgres_url: str) -> Iterator[dict[str, str]]:
    """A database in which docs/roles.sql and then the migrations were run: its URL for each of the two roles.

    The roles have names of the test's own: on a server with other databases they may exist.
    """
    names = {role: f"{role}_{uuid4().hex}" for role in ("cc_runtime", "cc_migrations")}
    name, sql = f"test_{uuid4().hex}", (ROOT / "docs/roles.sql").read_text()
    for role, own in names.items():
        sql = sql.replace(role, own)
    url = make_url(with_database(postgres_url, name))
    urls = {role: url.set(username=own).render_as_string(hide_password=False) for role, own in names.items()}
    asyncio.run(execute(postgres_url, f"CREATE DATABASE {name}"))
    try:
        asyncio.run(execute(url.render_as_string(hide_password=False), sql))
        if url.password:  # the server asks for one: the same as the tests' own
            passwords = [f"ALTER ROLE {own} PASSWORD '{url.password}'" for own in names.values()]
            asyncio.run(execute(postgres_url, *passwords))
        run_alembic(urls["cc_migrations"], "upgrade", "head").check_returncode()
        yield urls
    finally:
        roles = [f"DROP ROLE IF EXISTS {own}" for own in names.values()]
        asyncio.run(execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)", *roles))


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection, to look at what the service has committed."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
def settings(database_url: str) -> Settings:
    """The service's settings, by default but for the database."""
    return Settings(database_url=database_url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """The service's connections, without the service."""
    async with Database(settings) as database:
        yield database


@pytest.fixture
async def session(database: Database) -> AsyncIterator[AsyncSession]:
    """A session of `database`."""
    async with database.session() as session:
        yield session


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where the spans of `app` arrive, as any exporter sees them."""
    return InMemorySpanExporter()


@pytest.fixture
async def app(settings: Settings, exporter: InMemorySpanExporter) -> AsyncIterator[Service]:
    """The service, its spans going to `exporter`."""
    app = create_app(settings, span_processors=[SimpleSpanProcessor(exporter)])
    yield app
    await app.database.aclose()


@pytest.fixture
async def client(app: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`."""
    async with client_of(app) as client:
        yield client
