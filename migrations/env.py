"""Run migrations on the database that DATABASE_URL names."""

import asyncio

from alembic import context
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from backend.cc.deps import Settings, create_engine
from backend.cc.mem0_models import SCHEMA, Base
from backend.cc.services.logging import database_error

ADVISORY_LOCK = 0x636F735F6363
"""Key of the lock under which migrations run ("cos_cc" in ASCII): of several `upgrade head` at once, one
works and the others wait, then find nothing to do."""

TURN_TIMEOUT = "60s"
"""How long to wait for another migration to end."""

LOCK_TIMEOUT = "5s"
"""How long to wait for a table that the running service uses: its inserts queue up behind us meanwhile."""

_INSUFFICIENT_PRIVILEGE, _LOCK_NOT_AVAILABLE = "42501", "55P03"


def include_name(name: str | None, type_: str, parent_names: object) -> bool:
    """Look at our own schema only: what else lives in the database is none of our business."""
    return name == SCHEMA if type_ == "schema" else True


def migrate(connection: Connection) -> None:
    """Run the migrations, or `alembic check`, on a connection."""
    # All in one transaction, the schema included: a migration that fails leaves nothing behind. The lock
    # is released with the transaction, or with the connection if this process dies.
    with connection.begin():
        encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise CommandError(f"the database's encoding must be UTF8: {encoding} can't hold every prompt")
        connection.execute(text(f"SET LOCAL lock_timeout = '{TURN_TIMEOUT}'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()


def configure(**options: object) -> None:
    """Tell Alembic what is ours, and to keep its own table in the default schema, where it outlives ours."""
    context.configure(
        target_metadata=Base.metadata,
        version_table="alembic_version_cos_cc",
        include_schemas=True,
        include_name=include_name,
        compare_server_default=True,
        **options,  # type: ignore[arg-type]
    )


async def migrate_online() -> None:
    """Connect and migrate. What whoever runs it can mend is said in a line, not in a traceback."""
    try:
        engine = create_engine(Settings())
    except ValidationError as error:
        raise CommandError(str(error)) from None
    try:
        connection = await engine.connect()
    except SQLAlchemyError as error:
        raise CommandError(str(database_error(error))) from None
    try:
        # Whoever waited for another's migration has to see what it did, whatever the database's default is.
        await connection.execution_options(isolation_level="READ COMMITTED")
        await connection.run_sync(migrate)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in (_INSUFFICIENT_PRIVILEGE, _LOCK_NOT_AVAILABLE):
            raise
        raise CommandError(str(database_error(error))) from None
    finally:
        await connection.close()
        await engine.dispose()


if context.is_offline_mode():
    configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(migrate_online())
