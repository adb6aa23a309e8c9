"""Measure the PRD's success metrics: what scripts/sprint1_metrics does once everything is installed.

Everything is real and the measurement's own: an embedded PostgreSQL that is thrown away, the service in uvicorn, and an
OTLP receiver.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx
import uvloop
from uuid_utils.compat import uuid7

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.records import EventRecord, PromptRecord, Record
from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT, log_l1
from common.logger_logfire import configure_logfire, shutdown_logfire
from common.request_id_middleware import generate_request_id
from devtools import ROOT
from devtools.otlp import otlp_receiver
from devtools.postgres import server, temporary_home
from devtools.service import running_service
from devtools.traces import ROWS, by_trace, is_complete

RESULTS: Final = ROOT / "docs/phase2/sprint1_results.md"
BLOCK: Final = re.compile(r"(?<=<!-- sprint1_metrics -->\n).*(?=<!-- /sprint1_metrics -->)", re.DOTALL)
"""The part of the results that is this program's to write."""

SPAN_COMPLETE_RATE: Final = 0.95
INSERT_P95_MS: Final = 2.0
MODULE_COVERAGE: Final = 97.0
OVERALL_COVERAGE: Final = 90.0

CONNECTIONS: Final = 8
WARM_UP: Final = 200

PROMPT: Final = PromptRecord("user", "What is the capital of France?", tokens_in=8, tokens_out=0)
EVENT: Final = EventRecord("model.answered", {"model": "small", "cached": False, "tools": ["search"]})
BODY: Final = {
    "role": PROMPT.role,
    "content": PROMPT.content,
    "tokens_in": PROMPT.tokens_in,
    "event_type": EVENT.event_type,
    "payload": EVENT.payload,
}


@dataclass
class Metric:
    """A row of the table."""

    name: str
    goal: str
    measured: str
    reached: bool

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.goal} | {self.measured} | {'yes' if self.reached else '**no**'} |"


def say(text: str) -> None:
    """Tell the person who waits; standard output is the table's."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def receiver_process() -> Iterator[str]:
    """Run an OTLP receiver that keeps nothing, in a process of its own: it takes no time of this one's."""
    with subprocess.Popen([sys.executable, "-m", "devtools.otlp"], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield str(process.stdout and process.stdout.readline().strip())
        finally:
            process.kill()


async def load(address: str, requests: int) -> list[dict[str, str]]:
    """Send requests on several connections at once, each as fast as it is answered.

    Returns:
        The answers; an empty one for a request that was not answered 200.
    """
    answers: list[dict[str, str]] = []

    async def one_connection() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            while len(answers) < requests:
                answers.append({})
                mine = answers[-1]
                if len(answers) % -(-requests // 10) == 0:
                    say(f"  {len(answers):,} of {requests:,} requests sent")
                response = await client.post("/test-log", json=BODY)
                if response.status_code == httpx.codes.OK:
                    mine |= response.json()

    await asyncio.gather(*(one_connection() for _ in range(CONNECTIONS)))
    return answers


async def stored(database_url: str) -> dict[str, asyncpg.Record]:
    """Return every base row with what is linked to it, by its id."""
    connection = await asyncpg.connect(database_url)
    try:
        return {row["id"]: row for row in await connection.fetch(ROWS)}
    finally:
        await connection.close()


def span_complete_rate(database_url: str, requests: int) -> Metric:
    """Measure how many requests under load can be followed from their entry to their rows."""
    say(f"logfire_span_complete_rate: {requests:,} requests on {CONNECTIONS} connections ...")
    with otlp_receiver() as receiver, tempfile.TemporaryDirectory() as directory:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        with running_service(database_url, Path(directory, "log"), "--no-access-log", **environment) as service:
            start = time.monotonic()
            answers = asyncio.run(load(service.url, requests))
            seconds = time.monotonic() - start
            service.stop(30)
        traces = by_trace(receiver.spans)
    rows = asyncio.run(stored(database_url))
    complete = sum(is_complete(answer, traces[answer.get("trace_id", "")], rows) for answer in answers)
    rate = complete / len(answers)
    measured = f"{rate:.2%}: {complete:,} of {len(answers):,} requests, {len(answers) / seconds:,.0f} per second"
    say(f"  {measured}")
    goal = f"≥ {SPAN_COMPLETE_RATE:.0%}"
    return Metric("logfire_span_complete_rate", goal, measured, rate >= SPAN_COMPLETE_RATE)


async def insert_times(database_url: str, calls: int) -> dict[str, list[float]]:
    """Time `log_l1` and the bare statement that it sends, in turns, prompts and events in turns.

    Returns:
        Milliseconds of every call, by name.
    """
    connection = await asyncpg.connect(database_url)
    database = Database(Settings(database_url=database_url))
    payload = json.dumps(EVENT.payload)
    trace_id = "0af7651916cd43dd8448eb211c80319c"

    async def bare(record: Record) -> None:
        base = (uuid7(), datetime.now(UTC), "cc", generate_request_id(), trace_id)
        if isinstance(record, PromptRecord):
            fields = (record.role, record.content, record.tokens_in, record.tokens_out)
            await connection.execute(INSERT_PROMPT, *base, *fields)
        else:
            await connection.execute(INSERT_EVENT, *base, record.event_type, payload)

    async def whole(record: Record) -> None:
        await log_l1(session, record)

    times: dict[str, list[float]] = {"log_l1": [], "bare": []}
    async with database.session() as session:
        for number in range(WARM_UP + calls):
            if number == WARM_UP:  # as the service does at the end of its start-up
                gc.collect()
                gc.freeze()
            for name, call in (("log_l1", whole), ("bare", bare)):
                start = time.perf_counter()
                await call(EVENT if number % 2 else PROMPT)
                if number >= WARM_UP:
                    times[name].append((time.perf_counter() - start) * 1000)
    await connection.close()
    await database.aclose()
    return times


def insert_p95(database_url: str, calls: int) -> Metric:
    """Measure `log_l1` with tracing on and its spans exported, beside the least that it could cost."""
    say(f"mem0_insert_p95_ms: {calls:,} records, in turns with the bare statement ...")
    with receiver_process() as endpoint:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
        configure_logfire("cos-cc", otlp=True)
        times = uvloop.run(insert_times(database_url, calls))
        shutdown_logfire(5)
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    p95 = {name: statistics.quantiles(values, n=100)[94] for name, values in times.items()}
    p50 = {name: statistics.median(values) for name, values in times.items()}
    measured = f"{p95['log_l1']:.2f} ms (median {p50['log_l1']:.2f}); "
    measured += f"the bare statement on asyncpg {p95['bare']:.2f} ms (median {p50['bare']:.2f})"
    say(f"  {measured}")
    return Metric("mem0_insert_p95_ms", f"< {INSERT_P95_MS:g} ms", measured, p95["log_l1"] < INSERT_P95_MS)


def coverage_unit() -> tuple[Metric, dict[str, float], bool]:
    """Run the tests with coverage, as CI does.

    Returns:
        The metric, the percentage of each module of src, and whether all tests and gates passed.
    """
    say("coverage_unit: running scripts/coverage ...")
    passed = subprocess.run([ROOT / "scripts/coverage"], stdout=sys.stderr, check=False).returncode == 0
    report = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", "-"]
    data: dict[str, Any] = json.loads(subprocess.run(report, cwd=ROOT, stdout=subprocess.PIPE, check=False).stdout)
    modules = {
        name.removeprefix("src/"): file["summary"]["percent_covered"]
        for name, file in sorted(data["files"].items())
        if file["summary"]["num_statements"]
    }
    overall = data["totals"]["percent_covered"]
    worst = min(modules.values())
    measured = f"{overall:.1f}% overall, {worst:.1f}% in the least covered module"
    if not passed:
        measured += "; `./scripts/coverage` fails"
    goal = f"≥ {MODULE_COVERAGE:g}% of each module, ≥ {OVERALL_COVERAGE:g}% overall"
    reached = passed and worst >= MODULE_COVERAGE and overall >= OVERALL_COVERAGE
    return Metric("coverage_unit", goal, measured, reached), modules, passed


def ci_green(*, tests_passed: bool) -> Metric:
    """Run what CI runs besides the tests."""
    say("ci_green: running scripts/check ...")
    passed = subprocess.run([ROOT / "scripts/check"], stdout=sys.stderr, check=False).returncode == 0
    parts = {"./scripts/check": passed, "./scripts/coverage": tests_passed}
    measured = ", ".join(f"`{name}` {'passes' if ok else 'fails'}" for name, ok in parts.items())
    return Metric("ci_green", "every check passes", measured, all(parts.values()))


def machine(database_url: str) -> str:
    """Say what the figures were measured on."""

    async def version() -> str:
        connection = await asyncpg.connect(database_url)
        try:
            settings = ("server_version", "fsync", "synchronous_commit")
            found = [await connection.fetchval(f"SHOW {name}") for name in settings]
        finally:
            await connection.close()
        return f"PostgreSQL {found[0]} (fsync {found[1]}, synchronous_commit {found[2]})"

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, {cores} cores, {python}, {asyncio.run(version())}"


def main() -> int:
    """Measure and print. Returns the process's exit code: 0 if every metric is reached."""
    parser = argparse.ArgumentParser(prog="scripts/sprint1_metrics", description="Measure the success metrics.")
    parser.add_argument("--requests", type=int, default=5_000, help="requests of the load (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=4_000, help="calls of log_l1 to time (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"also put the table into {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()

    with temporary_home() as home, server(home) as database_url:
        migrate = [sys.executable, "-m", "alembic", "upgrade", "head"]
        subprocess.run(migrate, cwd=ROOT, env={**os.environ, "DATABASE_URL": database_url}, check=True)
        measured_on = machine(database_url)
        rate = span_complete_rate(database_url, arguments.requests)
        latency = insert_p95(database_url, arguments.calls)
    coverage, modules, tests_passed = coverage_unit()
    metrics = [rate, latency, coverage, ci_green(tests_passed=tests_passed)]

    command = shlex.join(["./scripts/sprint1_metrics", *sys.argv[1:]])
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} by `{command}` on {measured_on}.",
        "",
        "| metric | goal | measured | reached |",
        "|---|---|---|---|",
        *map(str, metrics),
        "",
        "| module | coverage, lines and branches |",
        "|---|---|",
        *(f"| `{name}` | {percent:.1f}% |" for name, percent in modules.items()),
    ]
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if arguments.write:
        RESULTS.write_text(BLOCK.sub(lambda _: table, RESULTS.read_text()))
        say(f"Written to {RESULTS.relative_to(ROOT)}.")
    return int(not all(metric.reached for metric in metrics))


if __name__ == "__main__":
    sys.exit(main())
