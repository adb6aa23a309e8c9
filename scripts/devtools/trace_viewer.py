"""Run a command with its traces going to a local viewer (lighttrace): what scripts/traces does once it is installed.

The viewer listens on the loopback interface alone and keeps its data in a private directory. It lives as
long as somebody holds the other end of its standard input: the command inherits it, so the viewer takes the
command's last spans and ends after it, however it ends.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from devtools import ROOT
from devtools.ports import HOST, listens, port_of, require_free
from devtools.waiting import until

START_SECONDS: Final = 30.0

HOME: Final = Path(sys.prefix, "var")
"""Of the viewer: its password, its log and the traces, in its own virtual environment."""


def run(port: int, command: list[str]) -> None:
    """Start the viewer and become the command, or wait to be stopped where there is none. Does not return.

    Args:
        port: Where the viewer listens on the loopback interface.
        command: A program, searched on the `PATH`, and its arguments.

    Raises:
        OSError: The port is taken, or the viewer did not start.
    """
    require_free(port, f"TRACES_PORT={port + 1}")
    HOME.mkdir(0o700, exist_ok=True)
    key, password = secrets.token_urlsafe(16), stored_password()
    reader, writer = os.pipe()
    with (HOME / "viewer.log").open("w") as log:
        viewer = subprocess.Popen(
            [sys.executable, "-m", "devtools.trace_viewer", "--view"],
            # Its own directory, its own environment: it would read a `.env` and anybody's LIGHTTRACE_*.
            cwd=HOME,
            env={
                "LIGHTTRACE_API_KEYS": key,
                "LIGHTTRACE_DB": "traces.db",
                "LIGHTTRACE_HOST": HOST,
                "LIGHTTRACE_PASSWORD": password,
                "LIGHTTRACE_PORT": str(port),
                "PYTHONPATH": str(ROOT / "scripts"),
            },
            stdin=reader,
            stdout=log,
            stderr=log,
            umask=0o077,
            start_new_session=True,  # a Ctrl-C is for the command, which then has spans to deliver
        )
    address = f"http://{HOST}:{port}"
    until(lambda: listens(port) or viewer.poll() is not None, START_SECONDS, "the viewer listens")
    if viewer.poll() is not None:
        raise OSError(f"the viewer did not start:\n{(HOME / 'viewer.log').read_text()}")
    note = f"See the traces at {address}/#/p/cos-cc (password: {password})"
    exporter = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": address,
        "OTEL_EXPORTER_OTLP_HEADERS": f"x-api-key={key}",
        # The viewer takes traces only.
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
    }
    if not command:
        print(f"{note}. Ctrl-C stops it.\nTo send yours there:\n")
        print(*(f"export {name}='{value}'" for name, value in exporter.items()), sep="\n", flush=True)
        sys.exit(viewer.wait())
    os.set_inheritable(writer, True)  # noqa: FBT003
    # The variants for traces alone would win over these.
    others = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_EXPORTER_OTLP_TRACES_")}
    os.execvpe(command[0], command, others | exporter | {"TRACES_NOTE": note})  # noqa: S606


def stored_password() -> str:
    """Return the viewer's password, made up once for each clone, so that a browser stays logged in."""
    path = HOME / "password"
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123 - its mode
            file.write(secrets.token_urlsafe(6))
    return path.read_text()


def view() -> None:
    """Be the viewer, until standard input ends."""
    import lighttrace  # type: ignore[import-not-found]  # noqa: PLC0415 - of the viewer's own environment

    threading.Thread(target=end_with_stdin, daemon=True).start()
    lighttrace.main()


def end_with_stdin() -> None:
    """Stop this process once nobody holds the other end of its standard input."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--view"]:
            del sys.argv[1:]
            view()
        else:
            run(port_of("TRACES_PORT", 1984), sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        sys.exit(f"traces: {error}")
