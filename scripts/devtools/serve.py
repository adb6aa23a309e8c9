"""Migrate the database and run the service: what scripts/serve does once everything is installed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

import uvicorn

from devtools.ports import HOST, listens, port_of, require_free
from devtools.postgres import ServerError, server
from devtools.waiting import until


def serve(port: int, arguments: list[str]) -> None:
    """Run the service until it is stopped. The database outlives it, so that its last requests can be finished.

    Args:
        port: Where to listen on the loopback interface.
        arguments: More of uvicorn's.
    """
    require_free(port, f"PORT={port + 1} ./scripts/serve")
    url = os.environ.get("DATABASE_URL")
    with contextlib.nullcontext(url) if url else server() as database_url:
        os.environ["DATABASE_URL"] = database_url
        subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], check=True)
        threading.Thread(target=announce, args=(port,), daemon=True).start()
        # In this process, not in a child: every signal is uvicorn's own, and nothing can be left behind.
        uvicorn.main(
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
            prog_name="uvicorn",
        )


def announce(port: int) -> None:
    """Print what to try, as soon as the service listens.

    Args:
        port: On the loopback interface.
    """
    until(lambda: listens(port), 60, "the service listens")
    print(f"\nThe service runs; Ctrl-C stops it. Try:\n\n{curl_line(port)}\n", flush=True)
    if note := os.environ.get("TRACES_NOTE"):  # from devtools/trace_viewer.py
        print(f"{note}\n", flush=True)


def curl_line(port: int) -> str:
    """Return a command that sends a request to the service.

    Args:
        port: Where it listens.
    """
    body = """'{"message": "hello"}'"""
    return f"curl -X POST http://{HOST}:{port}/test-log -H 'content-type: application/json' -d {body}"


def end_with_parent() -> None:
    """Stop this worker when uvicorn's parent process is gone: killed, it would leave the port taken for ever."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def stop(number: int, frame: FrameType | None) -> None:
    """Leave through every `finally` on SIGTERM, as on Ctrl-C."""
    sys.exit(128 + number)


if __name__ == "__mp_main__":  # a worker, with --workers or --reload
    threading.Thread(target=end_with_parent, daemon=True).start()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        serve(port_of("PORT", 8000), sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # its own message is on the terminal
    except (ServerError, OSError) as error:
        sys.exit(f"serve: {error}")
