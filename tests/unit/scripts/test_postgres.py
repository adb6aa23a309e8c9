"""The embedded PostgreSQL, with the real binaries: what is killed here is really killed."""

import fcntl
import os
import pwd
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools import ROOT
from devtools.postgres import Server, server, temporary_home
from devtools.waiting import until
from support.cluster import Postgres, fetch

POSTGRES = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()


def query(url: str, statement: str) -> object:
    [[value]] = fetch(url, statement)
    return value


def start_user(home: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Run a command that uses the PostgreSQL of `home`."""
    return subprocess.Popen(
        [sys.executable, "-m", "devtools.postgres", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "CC_POSTGRES_HOME": str(home), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def running(home: Path) -> bool:
    """Tell whether a process of this cluster lives: each of them holds the lock, and a zombie holds none."""
    with (home / "cluster.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture(scope="module")
def initialised_home() -> Iterator[Path]:
    with temporary_home() as home:
        with server(home) as url:
            fetch(url, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (42)")
        yield home


@pytest.fixture
def home(initialised_home: Path) -> Iterator[Path]:
    """A home with data, where nothing runs, before the test and after it."""
    yield initialised_home
    until(lambda: not running(initialised_home), what="nothing runs")


@pytest.fixture
def cluster(home: Path) -> Iterator[Server]:
    cluster = Server(home)
    cluster.start()
    yield cluster
    cluster.stop()


def test_the_data_is_kept_and_the_url_works_whatever_the_environment_says(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    with server(home) as url:
        assert query(url, "SELECT n FROM kept") == 42


def test_it_is_durable_and_neither_on_the_network_nor_readable_by_others(cluster: Server) -> None:
    settings = "concat_ws(' ', current_setting('fsync'), current_setting('synchronous_commit'))"
    assert query(cluster.url, f"SELECT {settings}") == "on on"
    assert query(cluster.url, "SHOW listen_addresses") == ""
    for directory in (cluster.home / "data", cluster.socket):
        found = directory.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, POSTGRES)
    assert stat.S_IMODE((cluster.home / "postgres.log").stat().st_mode) == 0o600
    assert cluster.answers()
    cluster.socket.chmod(0o755)
    assert not cluster.answers(), "others could have made this socket"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_user_that_a_signal_ends(home: Path, number: int) -> None:
    user = start_user(home, "sleep", "60")
    until(Server(home).answers)
    user.send_signal(number)
    user.communicate()
    assert user.returncode == -number
    until(lambda: not running(home))
    assert not Server(home).socket.exists()


def test_a_first_start_that_is_killed_leaves_nothing_that_runs_and_the_next_one_succeeds() -> None:
    with temporary_home() as home:
        user = start_user(home, "sleep", "60")
        until((home / "data.tmp").exists)
        user.kill()
        user.communicate()
        until(lambda: not running(home))
        with server(home) as url:
            assert query(url, "SELECT 1") == 1


def test_what_a_crash_leaves_does_not_prevent_the_next_start_and_a_stranger_is_not_signalled(cluster: Server) -> None:
    Postgres(cluster).kill()
    with subprocess.Popen(["/bin/sleep", "60"], user=POSTGRES if os.geteuid() == 0 else None) as stranger:
        pid_file = cluster.home / "data/postmaster.pid"
        _, *rest = pid_file.read_text().splitlines(keepends=True)
        pid_file.write_text("".join([f"{stranger.pid}\n", *rest]))
        cluster.start()
        assert query(cluster.url, "SELECT n FROM kept") == 42
        cluster.stop()
        assert stranger.poll() is None
        stranger.kill()


def test_a_second_user_is_told_what_to_do_and_the_first_keeps_its_server(cluster: Server) -> None:
    with pytest.raises(OSError, match=f"a process uses the PostgreSQL in {cluster.home}.*CC_POSTGRES_HOME$"):
        Server(cluster.home).start()
    assert cluster.answers()


def test_a_command_uses_the_server_that_runs_and_finds_psql(cluster: Server, tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    command = 'psql "$DATABASE_URL" -Atc "SELECT n FROM kept"; exit 7'
    user = start_user(cluster.home, "sh", "-c", command, PATH=str(tmp_path))
    assert (*user.communicate(), user.returncode) == ("42\n", "", 7)


def test_a_server_that_cannot_start_says_why(home: Path) -> None:
    settings = home / "data/postgresql.auto.conf"
    content = settings.read_text()
    settings.write_text("no_such_setting = 1\n")
    try:
        with pytest.raises(OSError, match="no_such_setting"), server(home):
            pass
    finally:
        settings.write_text(content)


def test_a_long_path_with_odd_characters_is_a_home_beside_another_that_runs(cluster: Server) -> None:
    with temporary_home() as home, server(home / "d e,e%p" / ("x" * 100)) as url:
        assert query(url, "SELECT to_regclass('kept')") is None
        assert query(cluster.url, "SELECT n FROM kept") == 42


def test_a_home_that_others_can_write_or_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    for home in (tmp_path, Path("/dev/null/home")):
        with pytest.raises(OSError, match=f"{home}.*CC_POSTGRES_HOME"):
            Server(home).start()
