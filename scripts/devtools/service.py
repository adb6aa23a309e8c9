"""The service as its users meet it: a real uvicorn process on a real socket."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from devtools import ROOT
from devtools.ports import HOST, free_port, listens
from devtools.waiting import until


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
        """Stop it with a signal and return its exit code. Raises TimeoutExpired after so many seconds."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextlib.contextmanager
def running_service(
    database_url: str, log_path: Path, *uvicorn_args: str, app: str = "backend.cc.cc_main:app", **environment: str
) -> Iterator[Service]:
    """Run the service until the block ends. Yields it once it accepts connections.

    What it prints goes to `log_path`. Raises RuntimeError with that text if it does not start.
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
    service = Service(f"http://{HOST}:{port}", port, process, log_path)
    try:
        until(lambda: listens(port) or process.poll() is not None, 30, "the service listens")
        if process.poll() is not None:
            raise RuntimeError(f"the service did not start:\n{service.log}")
        yield service
    finally:
        with contextlib.suppress(ProcessLookupError):  # the workers of a killed service may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
