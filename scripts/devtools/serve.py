"""Migrate the database and run the service: what scripts/serve does once everything is installed."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Final

import click
import uvicorn

from devtools.ports import HOST, listens, port_of, require_free
from devtools.postgres import ServerError, server
from devtools.waiting import until

HELP: Final = """\
./scripts/serve runs the service, with a PostgreSQL of its own unless DATABASE_URL is set.
./scripts/serve --traces, before any other option, also runs a viewer of its traces.
PORT is the port, 8000 by default. LOGFIRE_CONSOLE=false prints no spans. LOGFIRE_TOKEN sends them to Logfire.
The other options are uvicorn's:
"""

MORE: Final = "See more: `./scripts/serve --traces` shows traces in a browser; LOGFIRE_TOKEN=... sends them to Logfire."


def serve(port: int, arguments: list[str]) -> None:
    """Run the service until it is stopped. The database outlives it, so that its last requests can be finished.

    Args:
        port: Where to listen on the loopback interface.
        arguments: More of uvicorn's.
    """
    # Parsed before anything is started, so that --help and a wrong option are answered at once.
    context = uvicorn.main.make_context(
        "./scripts/serve",
        [
            "backend.cc.cc_main:app",
            "--app-dir=src",
            f"--host={HOST}",
            f"--port={port}",
            "--reset-contextvars",
            "--no-access-log",  # it would repeat query strings; the trace of a request says more
            "--timeout-graceful-shutdown=10",  # a client may never finish its request
            *arguments,
        ],
    )
    require_free(port, f"PORT={port + 1} ./scripts/serve")
    os.environ.setdefault("LOGFIRE_CONSOLE", "true")
    url = os.environ.get("DATABASE_URL")
    with contextlib.nullcontext(url) if url else server() as database_url:
        os.environ["DATABASE_URL"] = database_url
        # In a process group of its own: a Ctrl-C reaches this process alone, which then ends the migration without a
        # traceback. PostgreSQL rolls it back.
        subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], check=True, process_group=0)
        threading.Thread(target=announce, args=(port,), daemon=True).start()
        # In this process, not in a child: every signal is uvicorn's own, and nothing can be left behind.
        with context:
            uvicorn.main.invoke(context)


def announce(port: int) -> None:
    """Print what to try, as soon as the service listens.

    Args:
        port: On the loopback interface.
    """
    with contextlib.suppress(TimeoutError):
        until(lambda: listens(port), 60, "the service listens")
        # TRACES_NOTE is from devtools/trace_viewer.py.
        note = os.environ.get("TRACES_NOTE") or ("" if os.environ.get("LOGFIRE_TOKEN") else MORE)
        print(f"\nThe service runs; Ctrl-C stops it. Try:\n\n{curl_line(port)}\n\n{note}\n", flush=True)


def curl_line(port: int) -> str:
    """Return a command that sends a request to the service.

    Args:
        port: Where it listens.
    """
    body = """'{"message": "hello"}'"""
    return f"curl -X POST http://{HOST}:{port}/test-log -H 'content-type: application/json' -d {body}"


def says_more_than_cancelled(record: logging.LogRecord) -> bool:
    """Tell whether to print a line of uvicorn's: not the traceback of each task that a second Ctrl-C cancels."""
    return "CancelledError" not in f"{record.getMessage()} {record.exc_info}"


def end_with_parent() -> None:
    """Stop this worker when uvicorn's parent process is gone: killed, it would leave the port taken for ever."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def stop(number: int, frame: FrameType | None) -> None:
    """Leave through every `finally` on SIGTERM, as on Ctrl-C."""
    sys.exit(128 + number)


if __name__ in {"__main__", "__mp_main__"}:
    logging.getLogger("uvicorn.error").addFilter(says_more_than_cancelled)

if __name__ == "__mp_main__":  # a worker, with --workers or --reload
    threading.Thread(target=end_with_parent, daemon=True).start()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    if "--help" in sys.argv:
        print(HELP)
    try:
        serve(port_of("PORT", 8000), sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except click.exceptions.Exit as end:  # of --help and --version
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # its own message is on the terminal
    except (ServerError, OSError) as error:
        sys.exit(f"serve: {error}")
