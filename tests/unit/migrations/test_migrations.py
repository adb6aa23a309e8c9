import asyncio
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from devtools import ROOT
from support.database import alembic_process, execute, run_alembic

OURS = {"mem0_cc", "base_log", "event_log", "prompt_trace"}  # beside a service's own tables
OWN_TABLE = """

class MadeUpByATest(Base):
    \"\"\"A table of the service's own.\"\"\"

    __tablename__ = "made_up_by_a_test"
    __table_args__ = (sa.UniqueConstraint("title", "kind"), sa.CheckConstraint("title <> ''", name="title_not_empty"))

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    base_log_id: Mapped[UUID | None] = mapped_column(ForeignKey(BaseLog.id, ondelete="SET NULL"), index=True)
    title: Mapped[str] = mapped_column(Text, unique=True)
    kind: Mapped[str] = mapped_column(String(9), server_default="plain")
    extra: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=sa.text("'{}'"))
    written: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=sa.func.now())
"""


SCHEMA = """
SELECT nspname FROM pg_namespace WHERE nspname = 'mem0_cc'
UNION ALL SELECT tablename FROM pg_tables WHERE schemaname = 'mem0_cc'
"""


async def found(url: str) -> set[str]:  # the names of the schema and of its tables
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(SCHEMA)
    await connection.close()
    return {row[0] for row in rows}


def assert_done(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


async def test_up_down_and_up_again_leave_what_they_should(empty_database_url: str, tmp_path: Path) -> None:
    """From any directory, and each prints the revisions that it has applied."""
    revision = "5ab77549065e: Create schema `mem0_cc` with `base_log`, `prompt_trace` and `event_log`.\n"
    elsewhere = partial(alembic_process, empty_database_url, f"--config={ROOT}/alembic.ini", clone=tmp_path)
    upgraded, again = elsewhere("upgrade", "head"), elsewhere("upgrade", "head")
    assert_done(upgraded)
    assert upgraded.stdout.startswith(f"Upgraded to {revision}")
    assert (again.returncode, again.stdout, upgraded.stderr + again.stderr) == (0, "", "")
    assert await found(empty_database_url) >= OURS
    downgraded = elsewhere("downgrade", "base")
    assert_done(downgraded)
    assert downgraded.stdout.endswith(f"Downgraded from {revision}")
    assert await found(empty_database_url) == set()
    assert_done(run_alembic(empty_database_url, "upgrade", "head"))
    assert await found(empty_database_url) >= OURS


def test_a_migration_made_for_a_table_of_ones_own_is_complete_and_passes_the_linter_wherever_the_clone_is(
    database_url: str, tmp_path: Path
) -> None:
    clone = tmp_path / "50% %(here)s %s"  # where alembic.ini alone can't name its directories
    for name in ("migrations", "src"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    models = clone / "src/backend/cc/mem0_models.py"
    docstring, code = models.read_text().split("\n", 1)
    models.write_text(f"{docstring}\nimport sqlalchemy as sa\n{code}\n{OWN_TABLE}")
    for command in ("revision --autogenerate -m made_up", "upgrade head", "check"):
        assert_done(alembic_process(database_url, "--name=pyproject", *command.split(), clone=clone))
    (migration,) = clone.glob("migrations/versions/ae_*_made_up.py")
    for command in ("format", "check"):
        ruff = [sys.executable, "-m", "ruff", command, str(migration)]
        assert_done(subprocess.run(ruff, cwd=clone, capture_output=True, text=True, check=False))
    assert migration.read_text().count('op.f("uq_made_up_by_a_test_title') == 2


async def test_check_finds_no_drift_beside_other_peoples_schemas(database_url: str) -> None:
    await execute(
        database_url,
        "CREATE SCHEMA theirs",
        "CREATE TABLE theirs.base_log (id int PRIMARY KEY)",
        "CREATE TABLE public.unrelated (id int)",
        "CREATE TABLE public.alembic_version (version_num text PRIMARY KEY)",
        "INSERT INTO public.alembic_version VALUES ('theirs')",
    )
    assert_done(run_alembic(database_url, "check"))
    assert_done(run_alembic(database_url, "upgrade", "head"))


@pytest.mark.parametrize(
    ("drift", "operation"),
    [
        ("ALTER TABLE mem0_cc.base_log ADD COLUMN extra int", "remove_column"),
        ("ALTER TABLE mem0_cc.base_log ALTER COLUMN request_id SET DEFAULT 'x'", "modify_default"),
        ("ALTER TABLE mem0_cc.event_log ALTER COLUMN payload DROP NOT NULL", "modify_nullable"),
        ("DROP INDEX mem0_cc.ix_base_log_trace_id", "add_index"),
        ("CREATE TABLE mem0_cc.extra (id int)", "remove_table"),
    ],
)
async def test_check_finds_drift_of_our_own(database_url: str, drift: str, operation: str) -> None:
    await execute(database_url, drift)
    failed = run_alembic(database_url, "check")
    assert failed.returncode != 0
    assert f"('{operation}'" in failed.stdout + failed.stderr


async def test_several_upgrades_at_once_all_succeed(empty_database_url: str) -> None:
    name = make_url(empty_database_url).database
    await execute(empty_database_url, f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(lambda _: alembic_process(empty_database_url, "upgrade", "head"), range(4)):
            assert_done(result)
    assert await found(empty_database_url) >= OURS


async def test_the_sql_can_be_had_without_a_database_and_makes_the_same_schema(empty_database_url: str) -> None:
    sql = run_alembic("", "upgrade", "head", "--sql")
    assert_done(sql)
    await execute(empty_database_url, sql.stdout)
    assert_done(run_alembic(empty_database_url, "check"))


async def test_downgrade_takes_nothing_that_is_not_ours(database_url: str) -> None:
    await execute(database_url, "CREATE TABLE mem0_cc.theirs (id int)")
    assert run_alembic(database_url, "downgrade", "base").returncode != 0
    assert await found(database_url) >= OURS | {"theirs"}


async def test_an_error_that_an_operator_cannot_mend_is_a_traceback_with_the_statement(empty_database_url: str) -> None:
    await execute(empty_database_url, "CREATE SCHEMA mem0_cc", "CREATE DOMAIN mem0_cc.base_log AS int")
    failed = await asyncio.to_thread(run_alembic, empty_database_url, "upgrade", "head")
    assert failed.returncode != 0
    assert "CREATE TABLE mem0_cc.base_log" in failed.stderr
