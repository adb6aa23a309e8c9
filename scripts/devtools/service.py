"""The service as its users meet it: a real uvicorn process on a real socket."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from devtools import ROOT
from devtools.ports import free_port


@dataclass
class Service:
    """A running service."""

    url: str
    port: int
    process: subprocess.Popen[str]
    log_path: Path

    @property
    def log(self) -> str:
        """What it has printed so far, standard output and error together."""
        return self.log_path.read_text()

    def stop(self, timeout: float = 15, number: int = signal.SIGTERM) -> int:
        """Stop it with a signal and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextlib.contextmanager
def running_service(
    database_url: str, log_path: Path, *uvicorn_args: str, app: str = "backend.cc.cc_main:app", **environment: str
) -> Iterator[Service]:
    """Run the service until the block ends.

    Args:
        database_url: Its DATABASE_URL.
        log_path: Where to write what it prints.
        uvicorn_args: More arguments of uvicorn.
        app: What uvicorn serves.
        environment: More environment variables.
    """
    port = free_port()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, f"--port={port}", "--reset-contextvars", *uvicorn_args],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "DATABASE_URL": database_url, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    service = Service(f"http://127.0.0.1:{port}", port, process, log_path)
    try:
        _wait_until_it_answers(service)
        yield service
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers too, which may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(service: Service) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if service.process.poll() is not None:
            break
        try:
            httpx.get(f"{service.url}/openapi.json", timeout=5)
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"the service did not start:\n{service.log}")
