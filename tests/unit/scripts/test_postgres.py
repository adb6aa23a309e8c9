"""The embedded PostgreSQL, with the real binaries: what is killed here is really killed."""

import asyncio
import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from devtools import ROOT, postgres
from devtools.postgres import Server, ServerError, default_home, server, temporary_home
from devtools.waiting import until

COMMAND = [sys.executable, "-m", "devtools.postgres"]
SCRIPTS = {"PYTHONPATH": str(ROOT / "scripts")}
POSTGRES = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()


def query(url: str, *statements: str) -> object:
    async def run() -> object:
        connection = await asyncpg.connect(url)
        try:
            return [await connection.fetchval(statement) for statement in statements][-1]
        finally:
            await connection.close()

    return asyncio.run(run())


def postmaster(home: Path) -> int:
    return int((home / "data/postmaster.pid").read_text().split()[0])


def start_user(home: Path, program: str) -> subprocess.Popen[str]:
    """Run Python code that uses the cluster of `home`, as another process."""
    return subprocess.Popen(
        [*COMMAND, "run", "--", sys.executable, "-c", program],
        env={**os.environ, "CC_POSTGRES_HOME": str(home), **SCRIPTS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def stranger_of_the_same_user() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "60"], user=POSTGRES if os.geteuid() == 0 else None) as stranger:
        yield stranger
        stranger.kill()


PRINT_START = """
import asyncio, asyncpg, os
async def run():
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    print(await connection.fetchval("SELECT pg_postmaster_start_time()"), flush=True)
asyncio.run(run())
input()
"""


@contextmanager
def supervisor(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor whose pid is known, with this process as its user."""
    program = "import pathlib, sys; from devtools import postgres as e; e.supervise(pathlib.Path(sys.argv[1]))"
    with (home / "supervisor.lock").open("ab") as lock, (home / "users.lock").open("ab") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-c", program, home], env={**os.environ, **SCRIPTS}, pass_fds=(lock.fileno(),)
        )
        lock.close()
        try:
            yield process
        finally:
            users.close()
            process.wait()


@pytest.fixture(scope="module")
def initialised_home() -> Iterator[Path]:
    with temporary_home() as home:
        with server(home) as url:
            query(url, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (42)")
        yield home


@pytest.fixture
def home(initialised_home: Path) -> Iterator[Path]:
    """A home with data, where nothing runs, before the test and after it."""
    assert not Server(initialised_home).running()
    yield initialised_home
    try:
        assert not Server(initialised_home).running()
    finally:
        Server(initialised_home).stop()


@pytest.fixture
def cluster(home: Path) -> Iterator[Server]:
    """A server of the test's own."""
    cluster = Server(home)
    cluster.start()
    yield cluster
    cluster.stop()


def test_the_url_works_with_sqlalchemy_and_asyncpg_whatever_the_environment_says(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "nowhere.invalid")

    async def connect(url: str) -> object:
        engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
        async with engine.connect() as connection:
            result = await connection.execute(text("SELECT n FROM kept"))
        await engine.dispose()
        return result.scalar()

    with server(home) as url:
        assert asyncio.run(connect(url)) == 42


@pytest.mark.parametrize(
    ("setting", "value"), [("fsync", "on"), ("synchronous_commit", "on"), ("listen_addresses", ""), ("port", "5432")]
)
def test_it_is_durable_and_not_on_the_network(cluster: Server, setting: str, value: str) -> None:
    assert query(cluster.url, f"SHOW {setting}") == value


def test_data_and_socket_are_the_servers_alone(cluster: Server) -> None:
    for directory in (cluster.home / "data", cluster.home / "socket"):
        found = directory.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, POSTGRES)


def test_a_socket_directory_that_others_could_have_made_is_not_connected_to(cluster: Server) -> None:
    socket = cluster.home / "socket"
    socket.chmod(0o755)
    assert not cluster.answers()
    socket.chmod(0o700)
    assert cluster.answers()


def test_it_runs_until_the_last_user_has_left(home: Path) -> None:
    with ExitStack() as first:
        url = first.enter_context(server(home))
        with server(home) as second_url:
            assert second_url == url
            first.close()
            assert query(url, "SELECT n FROM kept") == 42
    assert not Server(home).running()


def test_the_last_user_does_not_wait_for_the_end_where_another_has_come(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as other:
        waited: list[Server] = []

        def come(cluster: Server) -> bool:
            waited.append(cluster)
            other.enter_context(server(home))
            return False

        with monkeypatch.context() as patch:
            patch.setattr(postgres, "_ended", come)
            with server(home):
                pass
        assert len(waited) == 1


def test_eight_first_starts_at_once_share_one_server() -> None:
    with temporary_home() as home:
        users = [start_user(home, PRINT_START) for _ in range(8)]
        starts = {user.stdout.readline() for user in users if user.stdout}
        assert len(starts) == 1
        assert starts != {""}
        for user in users:
            user.communicate("\n")
            assert user.returncode == 0
        until(lambda: not postgres._held(home / "supervisor.lock"))


def test_it_stops_when_its_last_user_is_killed(home: Path) -> None:
    user = start_user(home, PRINT_START)
    assert user.stdout
    user.stdout.readline()
    assert Server(home).answers()
    user.kill()
    user.communicate()
    until(lambda: not Server(home).running())


def test_a_killed_postmaster_is_started_again_with_the_data(home: Path) -> None:
    with server(home) as url:
        first = postmaster(home)
        os.kill(first, signal.SIGKILL)
        until(lambda: Server(home).answers() and postmaster(home) != first)
        assert query(url, "SELECT n FROM kept") == 42


def test_a_killed_backend_costs_no_data(home: Path) -> None:
    with server(home) as url:
        with pytest.raises((asyncpg.PostgresError, OSError)):
            query(url, "COPY (SELECT) TO PROGRAM 'kill -KILL $PPID'")
        until(Server(home).answers)
        assert query(url, "SELECT n FROM kept") == 42


def test_the_server_of_a_killed_supervisor_is_kept_for_its_users_and_then_stopped(home: Path) -> None:
    with supervisor(home) as process, server(home):
        first = postmaster(home)
        process.kill()
        process.wait()
        with server(home) as url:
            assert query(url, "SELECT n FROM kept") == 42
            assert postmaster(home) == first
    until(lambda: not Server(home).running())


def test_the_server_of_a_killed_supervisor_is_stopped_by_its_last_user(home: Path) -> None:
    with ExitStack() as stack:
        process = stack.enter_context(supervisor(home))
        with server(home):
            process.kill()
            process.wait()
            stack.close()
    assert not Server(home).running()


def test_a_killed_supervisors_child_that_lives_a_moment_longer_is_waited_for(home: Path) -> None:
    with ExitStack() as stack:
        process = stack.enter_context(supervisor(home))
        with server(home):
            process.kill()
            process.wait()
            with (home / "supervisor.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                child = subprocess.Popen(["/bin/sleep", "1"], pass_fds=(lock.fileno(),))
            stack.close()
    assert child.wait() == 0
    assert not Server(home).running()


def test_a_pid_file_that_names_a_living_stranger_harms_neither(home: Path) -> None:
    crashed = Server(home)
    crashed.start()
    assert crashed.process
    left = (home / "data/postmaster.pid").read_text()
    crashed.process.kill()
    crashed.stop()
    with stranger_of_the_same_user() as stranger:
        _, *rest = left.splitlines(keepends=True)
        (home / "data/postmaster.pid").write_text("".join([f"{stranger.pid}\n", *rest]))
        with server(home) as url:
            assert query(url, "SELECT n FROM kept") == 42
        assert stranger.poll() is None


def test_a_stranger_in_the_pid_file_of_an_orphan_is_not_signalled(home: Path) -> None:
    with supervisor(home) as process:
        until(Server(home).answers)
        process.kill()
    left = home / "data/postmaster.pid"
    with stranger_of_the_same_user() as stranger:
        left.write_text(left.read_text().replace(str(postmaster(home)), str(stranger.pid), 1))
        Server(home).stop()
        assert stranger.poll() is None


def test_a_zombie_is_not_running(home: Path) -> None:
    cluster = Server(home)
    cluster.start()
    assert cluster.process
    cluster.process.kill()
    os.waitid(os.P_PID, cluster.process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    until(lambda: not cluster.running())
    cluster.start()
    assert query(cluster.url, "SELECT n FROM kept") == 42
    cluster.stop()


def test_a_suspended_server_is_stopped_in_its_usual_time(cluster: Server) -> None:
    assert cluster.process
    cluster.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    cluster.stop()
    assert time.monotonic() - started < 10


def test_a_second_owner_is_refused(cluster: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_ORPHAN_SECONDS", 0.1)
    with pytest.raises(ServerError, match="another process runs"):
        Server(cluster.home).start()
    assert cluster.answers()


def test_what_an_interrupted_initdb_has_left_is_not_taken_for_a_cluster() -> None:
    with temporary_home() as home:
        cluster = Server(home)
        shutil.copytree(ROOT / "scripts", home / "data.tmp")
        (home / "data.tmp/PG_VERSION").write_text("18")
        cluster.start()
        assert query(cluster.url, "SELECT 1") == 1
        cluster.stop()


def test_a_server_that_cannot_start_says_why(home: Path) -> None:
    settings = home / "data/postgresql.auto.conf"
    content = settings.read_text()
    settings.write_text("no_such_setting = 1\n")
    try:
        with pytest.raises(ServerError, match="no_such_setting"):
            Server(home).start()
        with pytest.raises(ServerError, match="no_such_setting"), server(home):
            pass
    finally:
        settings.write_text(content)


def test_a_failing_initdb_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_home() as home:
        cluster = Server(home)
        call = postgres._call
        monkeypatch.setattr(
            postgres, "_call", lambda *command, **options: call(*command, "--no-such-option", **options)
        )
        with pytest.raises(ServerError, match="no-such-option"):
            cluster.start()
        assert not cluster.initialised


def test_the_wheel_is_asked_for_where_it_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_PACKAGE", "no_such_package")
    with pytest.raises(ServerError, match="scripts/install"):
        Server(home).start()


def test_a_home_that_cannot_name_a_socket_has_it_in_tmp() -> None:
    with temporary_home() as home:
        deep = home / "d e,e%p" / ("x" * 100)
        with server(deep) as url:
            assert query(url, "SELECT 1") == 1
            assert str(deep) not in url
            directory = Path(str(make_url(url).query["host"]))
            assert stat.S_IMODE(directory.lstat().st_mode) == 0o700
        assert not directory.exists()


def test_a_home_is_refused_where_others_could_write(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ServerError, match="must be a directory"):
        Server(tmp_path / "link")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ServerError, match="writable by everybody"):
        Server(tmp_path / "open")


@pytest.mark.skipif(os.geteuid() != 0, reason="what root has to mind")
def test_root_is_told_of_a_directory_that_nobody_can_pass_and_it_stays_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    with pytest.raises(ServerError, match="cannot pass"):
        Server(closed / "home")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def test_the_home_is_the_clones_own_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC_POSTGRES_HOME", raising=False)
    assert default_home().parent == (Path("/var/lib/cos-cc") if os.geteuid() == 0 else ROOT)
    monkeypatch.setenv("CC_POSTGRES_HOME", "elsewhere")
    assert default_home() == Path.cwd() / "elsewhere"


def test_a_command_is_run_with_its_own_exit_code_and_signals(home: Path) -> None:
    user = start_user(home, "import os; print(os.environ['DATABASE_URL'], flush=True); raise SystemExit(int(input()))")
    output, _ = user.communicate("7\n")
    assert output == f"{Server(home).url}\n"
    assert user.returncode == 7
    user = start_user(home, "print(1, flush=True); input()")
    assert user.stdout
    user.stdout.readline()
    user.terminate()
    user.communicate()
    assert user.returncode == -signal.SIGTERM
    until(lambda: not Server(home).running())


def test_a_command_finds_psql_where_the_machine_has_none(home: Path, tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    ask = 'psql "$DATABASE_URL" -Atc "SELECT 6 * 7"'
    command = [*COMMAND, "run", "--", "sh", "-c", ask]
    environment = {**os.environ, "PATH": str(tmp_path), "CC_POSTGRES_HOME": str(home), **SCRIPTS}
    assert subprocess.check_output(command, env=environment, text=True) == "42\n"
    until(lambda: not Server(home).running())


def test_a_command_that_does_not_exist_leaves_nothing_behind(home: Path) -> None:
    environment = {**os.environ, "CC_POSTGRES_HOME": str(home), **SCRIPTS}
    command = [*COMMAND, "run", "--", "no-such-command"]
    failed = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "no-such-command" in failed.stderr
    assert not Server(home).running()


def test_usage_is_explained() -> None:
    failed = subprocess.run(
        [*COMMAND, "run"], env={**os.environ, **SCRIPTS}, check=False, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "run -- COMMAND" in failed.stderr
