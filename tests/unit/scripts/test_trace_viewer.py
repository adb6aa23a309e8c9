"""`scripts/traces`, with a viewer that is a stub: a web server that writes down what it was started with."""

import os
import signal
import socket
import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from devtools import ROOT
from devtools.ports import free_port, listens
from devtools.waiting import until

STUB = """\
import http.server, os, pathlib

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def main():
    pathlib.Path("environment").write_text("\\n".join(sorted(os.environ)))
    pathlib.Path("pid").write_text(str(os.getpid()))
    address = (os.environ["LIGHTTRACE_HOST"], int(os.environ["LIGHTTRACE_PORT"]))
    http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment in which the viewer is the stub."""
    venv.create(tmp_path / "v", symlinks=True)
    (site_packages,) = (tmp_path / "v").glob("lib/python*/site-packages")
    (site_packages / "lighttrace.py").write_text(STUB)
    return tmp_path / "v"


def start(environment: Path, port: int, *command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [environment / "bin/python", "-m", "devtools.trace_viewer", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "TRACES_PORT": str(port), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def refused(environment: Path, port: int) -> str:
    process = start(environment, port, "echo", "never")
    printed, errors = process.communicate(timeout=60)
    assert (printed, process.returncode) == ("", 1)
    return errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_becomes_the_process_and_the_viewer_ends_however_it_ends(environment: Path, number: int) -> None:
    port = free_port()
    command = start(environment, port, sys.executable, "-c", "print('started', flush=True); input()")
    assert command.stdout is not None
    assert command.stdout.readline() == "started\n"
    assert listens(port)
    os.killpg(command.pid, number)
    command.communicate(timeout=20)
    assert command.returncode == -number
    until(lambda: not listens(port))


def test_viewer_and_command_get_nothing_of_the_environment_that_is_the_others(environment: Path) -> None:
    secrets = {"LOGFIRE_TOKEN": "secret", "DATABASE_URL": "postgresql://secret", "LIGHTTRACE_PRICES": "{}"}
    for_traces_alone = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}
    printed, _ = start(environment, free_port(), "env", **secrets, **for_traces_alone).communicate(timeout=60)
    assert not for_traces_alone.keys() & {line.partition("=")[0] for line in printed.splitlines()}
    assert {"OTEL_METRICS_EXPORTER=none", "OTEL_LOGS_EXPORTER=none"} <= set(printed.splitlines())
    assert not secrets.keys() & set((environment / "var/environment").read_text().split())
    assert stat.S_IMODE((environment / "var").stat().st_mode) == 0o700


def test_a_port_that_is_taken_and_a_viewer_that_does_not_start_are_refused_with_the_way_out(environment: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"TRACES_PORT={port + 1}" in refused(environment, port)
    (stub,) = environment.glob("lib/python*/site-packages/lighttrace.py")
    stub.write_text("raise SystemExit('out of order')")
    assert "out of order" in refused(environment, free_port())
