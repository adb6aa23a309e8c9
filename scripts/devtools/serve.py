"""Migrate the database and run the service: what scripts/serve does once everything is installed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any, Final

import click
import uvicorn

from devtools.ports import HOST, listens, require_free
from devtools.postgres import server
from devtools.waiting import until

HELP: Final = """\
Run the service, with a PostgreSQL of its own unless DATABASE_URL is set. --traces, before any other option, also runs
a viewer of its traces. --reload starts it again whenever a file in src changes. LOGFIRE_CONSOLE=false prints no spans,
LOGFIRE_TOKEN sends them to Logfire, PORT is the port. The other options are uvicorn's."""

MORE: Final = "See more: `./scripts/serve --traces` shows traces in a browser; LOGFIRE_TOKEN=... sends them to Logfire."


def serve(port: int, **options: Any) -> None:
    """Run the service, with uvicorn's options. The database outlives it, so that its last requests can be finished."""
    try:
        require_free(port, f"PORT={port + 1} ./scripts/serve")
        os.environ.setdefault("LOGFIRE_CONSOLE", "true")
        url = os.environ.get("DATABASE_URL")
        with contextlib.nullcontext(url) if url else server() as database_url:
            os.environ["DATABASE_URL"] = database_url
            # In a process group of its own: a Ctrl-C reaches this process alone, which then ends the migration without
            # a traceback. PostgreSQL rolls it back.
            # The clone's path may have a `%` in it (alembic.ini).
            migrate = [sys.executable, "-m", "alembic", "--name=pyproject", "upgrade", "head"]
            subprocess.run(migrate, check=True, process_group=0)
            threading.Thread(target=announce, args=(port,), daemon=True).start()
            # In this process, not in a child: every signal is uvicorn's own, and nothing can be left behind.
            click.get_current_context().invoke(uvicorn.main, port=port, **options)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def announce(port: int) -> None:
    """Print what to try, as soon as the service listens on a port."""
    with contextlib.suppress(TimeoutError):
        until(lambda: listens(port), 60, "the service listens")
        note = os.environ.get("TRACES_NOTE") or ("" if os.environ.get("LOGFIRE_TOKEN") else MORE)
        print(f"\nThe service runs; Ctrl-C stops it. Try:\n\n{curl_line(port)}\n\n{note}\n", flush=True)


def curl_line(port: int) -> str:
    """Return a command that sends a request to the service on a port."""
    body = """'{"message": "hello"}'"""
    return f"curl -X POST http://{HOST}:{port}/test-log -H 'content-type: application/json' -d {body}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # through every `finally`, as a Ctrl-C
    # uvicorn's options are parsed before anything is started: --help and a wrong option are answered at once.
    command = click.Command("serve", callback=serve, params=uvicorn.main.params, help=HELP)
    try:
        options = (
            f"--host={HOST}",
            f"--port={os.environ.get('PORT') or 8000}",
            "--reset-contextvars",
            "--no-access-log",  # it would repeat query strings; the trace of a request says more
            "--timeout-graceful-shutdown=10",  # a client may never finish its request
            *(["--reload-dir=src"] if "--reload" in sys.argv else []),  # not the virtual environments of the clone
        )
        command.main(["backend.cc.cc_main:app", "--app-dir=src", *options, *sys.argv[1:]], "./scripts/serve")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # its own message is on the terminal
    except OSError as error:
        sys.exit(f"serve: {error}")
