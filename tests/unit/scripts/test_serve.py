"""`scripts/serve`, run as that script runs it, on a database of the test's own."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from devtools import ROOT, serve
from devtools.ports import HOST, free_port
from devtools.waiting import until


@contextlib.contextmanager
def serving(log_path: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run it in a process group of its own, so that a signal can be sent as a terminal sends it, to the whole group."""
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "devtools.serve"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "PYTHONUNBUFFERED": "", **environment},
            stdout=log,
            stderr=log,
            process_group=0,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_newcomer_sees_the_spans_of_the_first_request_and_the_way_to_more(database_url: str, tmp_path: Path) -> None:
    log_path, port = tmp_path / "log", free_port()
    with serving(log_path, DATABASE_URL=database_url, PORT=str(port), TRACES_NOTE="See the traces there") as process:
        until(lambda: "curl" in log_path.read_text(), 60, "the service runs")
        assert httpx.post(f"http://{HOST}:{port}/test-log", json={"message": "hello"}).status_code == 200
        until(lambda: "log_l1" in log_path.read_text(), what="the spans are printed, to a file as to a pipe")
        os.killpg(process.pid, signal.SIGINT)
        process.wait(15)
    printed = log_path.read_text()
    first, _, then = printed.partition(serve.curl_line(port))
    assert "POST /test-log" not in first
    assert "See the traces there" in then
    assert "POST /test-log" in then
    assert "log_l1" in then
