"""A primary and a standby that streams from it."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import make_url

from devtools import postgres as embedded
from devtools.waiting import until
from support.cluster import Postgres, fetch
from support.database import with_database

READ_WRITE = "target_session_attrs=read-write"


class Pair:
    """A primary and its standby. They keep these names after a promotion, but for `swap`.

    Attributes:
        both: A database URL with both hosts, of which asyncpg takes the one that can be written to.
    """

    def __init__(self, primary: Postgres, standby: Postgres) -> None:
        self.primary, self.standby = primary, standby
        hosts = f"host={primary.server.socket},{standby.server.socket}&port=5432,5432"
        self.both = f"postgresql://postgres@/{make_url(primary.url).database}?{hosts}&{READ_WRITE}"

    def make_synchronous(self) -> None:
        """Let every commit wait for the standby."""
        _set(self.primary.url, "synchronous_standby_names = '*'")
        until(lambda: fetch(self.primary.url, "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'"))

    def promote(self) -> float:
        """Make the standby a primary, and return the time when it was one."""
        fetch(self.standby.url, "SELECT pg_promote()")
        return time.monotonic()

    def switch_over(self) -> float:
        """Promote the standby. The old primary keeps its connections and refuses to write."""
        _set(self.primary.url, "default_transaction_read_only = on")
        [row] = fetch(self.primary.url, "SELECT pg_current_wal_lsn()::text AS lsn")
        until(lambda: fetch(self.standby.url, f"SELECT WHERE pg_last_wal_replay_lsn() >= '{row['lsn']}'"))
        return self.promote()

    def swap(self) -> float:
        """Stop the primary, promote the standby, and start the old primary as a standby of the new one."""
        _set(self.primary.url, f"primary_conninfo = 'host={self.standby.server.socket} port=5432 user=postgres'")
        self.primary.stop()
        promoted = self.promote()
        (self.primary.server.home / "data/standby.signal").touch()
        self.primary.start()
        self.primary, self.standby = self.standby, self.primary
        return promoted

    def heal(self) -> None:
        """Undo what doesn't need another pair."""
        for postgres in (self.primary, self.standby):
            postgres.heal()
            until(postgres.server.answers)
        _set(self.primary.url, "synchronous_standby_names = ''")


@contextlib.contextmanager
def replicated(origin: Postgres, database_url: str) -> Iterator[Pair]:
    """Run a pair whose servers begin with what is in `origin`. Their URLs lead to the database of `database_url`."""
    with embedded.temporary_home() as home, contextlib.ExitStack() as stack:
        primary, standby = (Postgres(embedded.Server(home.parent / name)) for name in ("primary", "standby"))
        for server, source in ((primary, origin), (standby, primary)):
            _base_backup(source, server.server.home, *(["--write-recovery-conf"] if source is primary else []))
            server.start()
            stack.callback(_end, server)
            server.url = with_database(server.url, str(make_url(database_url).database))
        until(lambda: fetch(primary.url, "SELECT FROM pg_stat_replication WHERE state = 'streaming'"))
        yield Pair(primary, standby)


def _base_backup(source: Postgres, home: Path, *options: str) -> None:
    home.mkdir(0o711)
    data, owner = home / "data", embedded._owner()
    options = (f"--pgdata={data}", f"--dbname={source.url}", "--checkpoint=fast", "--no-sync", *options)
    subprocess.run((embedded._pginstall() / "bin/pg_basebackup", *options), check=True, env={"LC_ALL": "C"})
    with (data / "postgresql.auto.conf").open("a") as settings:
        settings.write("wal_retrieve_retry_interval = '50ms'\n")
    for path in (data, *data.rglob("*")):
        os.chown(path, owner.pw_uid, owner.pw_gid)


def _end(server: Postgres) -> None:
    server.heal()  # one that was killed leaves shared memory behind, which only its next start finds
    server.stop()


def _set(url: str, setting: str) -> None:
    """Change a setting of a running server, also for the connections that it has."""
    for statement in (f"ALTER SYSTEM SET {setting}", "SELECT pg_reload_conf()"):
        fetch(url, statement)
