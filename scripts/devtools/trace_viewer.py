"""Run a command with its traces going to a local viewer (lighttrace): what scripts/traces does once it is installed.

The viewer listens on the loopback interface alone. The command inherits the write end of the viewer's standard input.
The kernel closes it when the command ends, however it ends, and the viewer ends after it, with its last spans.
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
from devtools.ports import HOST, listens, require_free
from devtools.waiting import until

HOME: Final = Path(sys.prefix, "var")  # the viewer's password, log and traces, in its own virtual environment


def run(port: int, command: list[str]) -> None:
    """Start the viewer on a port, then become the command. Raises OSError if that fails."""
    require_free(port, f"TRACES_PORT={port + 1}")
    HOME.mkdir(0o700, exist_ok=True)
    password_file, log_file = HOME / "password", HOME / "viewer.log"
    if not password_file.exists():  # made once for each clone, so that a browser stays logged in
        password_file.write_text(secrets.token_urlsafe(6))
    password = password_file.read_text()
    with log_file.open("w") as log:
        viewer = subprocess.Popen(
            [sys.executable, "-m", "devtools.trace_viewer", "--view"],
            # Its own directory and environment, so that it reads neither a `.env` nor LIGHTTRACE_* of the user's.
            cwd=HOME,
            env={
                "LIGHTTRACE_API_KEYS": password,
                "LIGHTTRACE_DB": "traces.db",
                "LIGHTTRACE_HOST": HOST,
                "LIGHTTRACE_PASSWORD": password,
                "LIGHTTRACE_PORT": str(port),
                "PYTHONPATH": str(ROOT / "scripts"),
            },
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for the command, which then has spans to deliver
        )
    until(lambda: listens(port) or viewer.poll() is not None, 30, "the viewer listens")
    if viewer.stdin is None or viewer.poll() is not None:
        raise OSError(f"the viewer did not start:\n{log_file.read_text()}")
    os.set_inheritable(viewer.stdin.fileno(), True)  # noqa: FBT003
    address = f"http://{HOST}:{port}"
    # The variants for traces alone would win over these.
    others = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_EXPORTER_OTLP_TRACES_")}
    exporter = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": address,
        "OTEL_EXPORTER_OTLP_HEADERS": f"x-api-key={password}",
        "OTEL_LOGS_EXPORTER": "none",  # the viewer takes traces only
        "OTEL_METRICS_EXPORTER": "none",
        "TRACES_NOTE": f"See the traces at {address}/#/p/cos-cc (password: {password})",
    }
    os.execvpe(command[0], command, others | exporter)  # noqa: S606


def view() -> None:
    """Be the viewer, until no process holds the other end of standard input."""
    import lighttrace  # type: ignore[import-not-found]  # noqa: PLC0415 - of the viewer's own environment

    def end() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    del sys.argv[1:]
    threading.Thread(target=end, daemon=True).start()
    lighttrace.main()


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--view"]:
            view()
        else:
            run(int(os.environ.get("TRACES_PORT") or 1984), sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (OSError, ValueError) as error:
        sys.exit(f"traces: {error}")
