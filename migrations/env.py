"""Run migrations on the database that DATABASE_URL names."""

import asyncio
from functools import partial
from typing import Final

from alembic import context
from alembic.runtime.migration import MigrationInfo
from alembic.script import Script
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy import Connection, NullPool, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from backend.cc.config import Settings
from backend.cc.connection import connect
from backend.cc.errors import database_error
from backend.cc.mem0_models import SCHEMA, Base

ADVISORY_LOCK: Final = 0x636F735F6363
"""Key of the lock under which migrations run ("cos_cc" in ASCII). Of several `upgrade head` at once one works, and the
others wait, then find nothing to do."""

TURN_TIMEOUT: Final = "60s"
"""How long to wait for another migration to end."""

LOCK_TIMEOUT: Final = "5s"
"""How long to wait for a table that the running service uses. Its inserts queue up behind a waiting migration."""

PARTITIONED: Final = "SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass('mem0_cc.base_log')"
"""Whether docs/partitions.sql was run here (docs/decisions/0012)."""

OPERATORS_TO_MEND: Final = frozenset({"08", "28", "3D", "42501", "42P07", "55P03"})
"""SQLSTATEs, or their classes, that an operator can mend: one line is printed, and no traceback. No connection,
login refused, no such database, a missing privilege, a table that exists already, a lock."""


def include_name(name: str | None, type_: str, parent_names: object) -> bool:
    """Compare the service's own schema only: other parts of the database belong to others."""
    return name == SCHEMA if type_ == "schema" else True


def migrate(connection: Connection) -> None:
    """Run the migrations, or `alembic check`, on a connection. Print the revisions once they are committed."""
    applied: list[str] = []

    def note(*, step: MigrationInfo, **_: object) -> None:
        verb = "Stamped" if step.is_stamp else "Upgraded to" if step.is_upgrade else "Downgraded from"
        scripts = (script for script in step.up_revisions if isinstance(script, Script))
        applied.extend(f"{verb} {script.revision}: {script.doc}" for script in scripts)

    # One transaction holds all of it, the schema included: a migration that fails leaves nothing behind. The lock is
    # released with the transaction, or with the connection if this process dies.
    with connection.begin():
        encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding != "UTF8":
            raise CommandError(f"the database's encoding must be UTF8: {encoding} can't hold every prompt")
        if connection.scalar(text("SELECT current_schema()")) in (None, SCHEMA):
            raise CommandError(f"search_path must begin with a schema for Alembic's own table, and not with {SCHEMA}")
        connection.execute(text(f"SET LOCAL lock_timeout = '{TURN_TIMEOUT}'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        # The foreign keys of a partitioned store are on its partitions, in a schema that Alembic does not look at.
        partitioned = connection.scalar(text(PARTITIONED))
        configure(
            connection=connection,
            on_version_apply=note,
            include_object=lambda _item, _name, kind, *_: not partitioned or kind != "foreign_key_constraint",
        )
        with context.begin_transaction():
            context.run_migrations()
    for line in applied:
        context.config.print_stdout("%s", line)


def configure(**options: object) -> None:
    """Tell Alembic which schema is the service's. Its own table is in the default schema, which `downgrade` keeps."""
    context.configure(
        target_metadata=Base.metadata,
        version_table="alembic_version_cos_cc",
        include_schemas=True,
        include_name=include_name,
        compare_server_default=True,
        **options,  # type: ignore[arg-type]
    )


async def migrate_online() -> None:
    """Connect and migrate. An error that an operator can mend is one line, not a traceback."""
    try:
        settings = Settings()
    except ValidationError as error:
        raise CommandError(str(error)) from None
    creator = partial(connect, settings, settings.cc_db_timeout_seconds)
    engine = create_async_engine("postgresql+asyncpg://", async_creator=creator, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            # A migration that waited for another one must see what that one did, whatever the server's default is.
            await connection.execution_options(isolation_level="READ COMMITTED")
            await connection.run_sync(migrate)
    except SQLAlchemyError as error:
        meaning = database_error(error)
        if {meaning.code, meaning.code[:2]} & OPERATORS_TO_MEND:
            raise CommandError(str(meaning)) from None
        raise


if context.is_offline_mode():
    configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(migrate_online())
