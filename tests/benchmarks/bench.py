"""Measure what `log_l1` and tracing cost beside the bare INSERT, and write docs/performance.md. See scripts/bench.

Whatever is compared runs side by side: a process for each variant, and one short round of each after the other, so
that whatever else happens on the machine happens to all of them. Ratios are taken within a round.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import asyncpg
import psutil
from sqlalchemy import make_url

from benchmarks import report
from devtools import ROOT
from devtools.otlp import otlp_receiver
from devtools.postgres import server, temporary_home
from devtools.service import Service, running_service
from devtools.traces import by_trace, is_whole
from support.database import alembic_process, execute, with_database
from support.wire import counted

Round = dict[str, float]

OURS: Final = "backend.cc.cc_main:app"


def say(text: str) -> None:
    """Print what is going on."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


async def _fetch(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def fetch(url: str, statement: str) -> Any:
    """Run one statement and return the first value of its first row."""
    return asyncio.run(_fetch(url, statement))


def new_database(server_url: str, template: str = "") -> str:
    """Create a database and return its URL: a copy of `template`, or one made by the real migrations."""
    name = f"bench_{uuid4().hex}"
    asyncio.run(execute(server_url, f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else "")))
    url = with_database(server_url, name)
    if not template:
        alembic_process(url, "upgrade", "head").check_returncode()
    return url


@contextmanager
def child(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module of Python until the block ends. Its standard input and output are pipes."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """Read one line of what a child prints."""
    if process.stdout is None or not (text := process.stdout.readline()):
        raise RuntimeError(f"{process.args!r} has ended: see its message above")
    return text.strip()


@contextmanager
def receiver() -> Iterator[str]:
    """Run an OTLP receiver that keeps nothing, in a process of its own. It also stands for Logfire's endpoint."""
    with child("devtools.otlp") as process:
        yield line(process)


@contextmanager
def caller(variant: str, url: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run benchmarks/calls.py; see there."""
    with child("benchmarks.calls", variant, DATABASE_URL=url, **environment) as process:
        line(process)
        yield process


def calls(process: subprocess.Popen[str], count: int) -> Round:
    """Let a caller make so many calls, and return what one took, in milliseconds."""
    assert process.stdin is not None  # for mypy
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    answer: Round = json.loads(line(process))
    return answer


def service(url: str, log: Path, app: str = OURS, **environment: str) -> AbstractContextManager[Service]:
    """Run an application as `devtools.service` does, with one worker."""
    return running_service(url, log, "--app-dir=tests", "--no-access-log", "--log-level=error", app=app, **environment)


def exporting(endpoint: str) -> dict[str, dict[str, str]]:
    """Return the environment of a service that sends its spans to `endpoint`, by the way of sending."""
    return {
        "otlp": {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
        "token": {"LOGFIRE_TOKEN": "pylf_v1_us_0123456789", "LOGFIRE_BASE_URL": endpoint},
    }


def load(port: int, connections: int, seconds: float) -> dict[str, Any]:
    """Run benchmarks/load.py; see there."""
    with tempfile.NamedTemporaryFile() as file:
        arguments = (str(port), str(connections), str(seconds), file.name)
        command = [sys.executable, "-m", "benchmarks.load", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, timeout=seconds + 30)
        answer: dict[str, Any] = json.load(file)
    if answer["failures"]:
        raise RuntimeError(f"{answer['failures']} requests were not answered 200")
    return answer


# --- the five measurements ------------------------------------------------------------------------------------------


def measure_log_l1(server_url: str, rounds: int) -> dict[str, list[Round]]:
    """One durable record, one caller, connections warm."""
    results: dict[str, list[Round]] = defaultdict(list)
    url = new_database(server_url)
    with ExitStack() as stack:
        endpoint = stack.enter_context(receiver())
        callers = {
            "held": stack.enter_context(caller("held", url)),
            "pool": stack.enter_context(caller("pool", url)),
            "pool_without_reset": stack.enter_context(caller("pool_without_reset", url)),
            "log_l1": stack.enter_context(caller("log_l1", url)),
            "exporting": stack.enter_context(caller("log_l1", url, **exporting(endpoint)["otlp"])),
            "orm": stack.enter_context(caller("orm", url)),
        }
        for number in range(1, rounds + 1):
            say(f"1/5 log_l1: round {number} of {rounds}")
            for variant, process in callers.items():
                results[variant].append(calls(process, 200))
    return dict(results)


def measure_load(server_url: str, rounds: dict[int, int], seconds: float) -> dict[str, dict[str, list[Round]]]:
    """POST /test-log as fast as one worker answers; `rounds` are by the number of connections."""
    results: dict[str, dict[str, list[Round]]] = {}
    url = new_database(server_url)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways = exporting(stack.enter_context(receiver()))
        variants: dict[str, tuple[str, dict[str, str]]] = {
            "floor": ("benchmarks.floor:app", {}),
            "untraced": (OURS, {}),
            "otlp": (OURS, ways["otlp"]),
            "token": (OURS, ways["token"]),
            "instrumented": ("benchmarks.instrumented:app", ways["otlp"]),
        }
        services = {
            variant: stack.enter_context(service(url, directory / variant, app, **environment))
            for variant, (app, environment) in variants.items()
        }
        times = {variant: psutil.Process(each.process.pid).cpu_times for variant, each in services.items()}
        for each in services.values():
            load(each.port, 8, seconds)
        for connections, count in rounds.items():
            loads: dict[str, list[Round]] = defaultdict(list)
            cpu: dict[str, list[float]] = defaultdict(list)
            for number in range(1, count + 1):
                say(f"2/5 POST /test-log, {connections} connections: round {number} of {count}")
                for variant, each in services.items():
                    # Read just before a round, so that the spans that a service has sent since its last round count.
                    cpu[variant].append(sum(times[variant]()[:2]))
                    answer = load(each.port, connections, seconds)
                    del answer["traces"]
                    loads[variant].append(answer)
            for variant, done in loads.items():
                cpu[variant].append(sum(times[variant]()[:2]))
                for each_round, before, after in zip(done, cpu[variant], cpu[variant][1:], strict=False):
                    each_round["cpu"] = (after - before) * 1e3 / each_round["requests"]
            results[str(connections)] = dict(loads)
    return results


FILL: Final = """
    WITH request AS MATERIALIZED (
        SELECT i, age, uuidv7(age) AS prompt_id, uuidv7(age) AS event_id,
               gen_random_uuid()::text AS request_id, replace(uuidv7(age)::text, '-', '') AS trace_id
        FROM generate_series($1::int, $2::int) AS i, LATERAL (SELECT (i - 3000000) * interval '100 ms' AS age) AS ages
    ), base AS (
        INSERT INTO mem0_cc.base_log (id, "timestamp", source_module, request_id, trace_id)
        SELECT id, now() + age, 'cc', request_id, trace_id
        FROM request, LATERAL (VALUES (prompt_id), (event_id)) AS ids (id)
    ), prompt AS (
        INSERT INTO mem0_cc.prompt_trace (base_log_id, role, content, tokens_in, tokens_out)
        SELECT prompt_id, 'user', 'What is the capital of France? ' || i, 12, 7 FROM request
    ), event AS (
        INSERT INTO mem0_cc.event_log (base_log_id, event_type, payload)
        SELECT event_id, 'test_log', jsonb_build_object('message', 'hello', 'number', i) FROM request
    )
    SELECT set_config('session_replication_role', 'origin', false)
"""
"""Requests of the past, one in 100 ms, each with a prompt and an event; ids as the service makes them."""

SIZE: Final = """
    SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
    WHERE relnamespace = 'mem0_cc'::regnamespace AND relkind = 'r'
"""


async def _fill(url: str, stored: int, records: int) -> None:
    connection = await asyncpg.connect(url)
    step = 50_000
    for first in range(stored // 2, records // 2, step):
        say(f"3/5 growth: {2 * first:,} of {records:,} records")
        # The foreign keys hold by construction. To check five million of them would take longer than to write them.
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(FILL, first + 1, first + step)
    await connection.execute("VACUUM (ANALYZE)")
    await connection.execute("CHECKPOINT")
    await connection.close()


def measure_growth(server_url: str, rounds: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The same calls beside more and more records: a database for each size, rounds from one to the next."""
    results: dict[str, Any] = {}
    url, stored = "", 0
    databases = {}
    with ExitStack() as stack:
        callers = {}
        for records in sizes:
            url = new_database(server_url, make_url(url).database or "" if url else "")
            asyncio.run(_fill(url, stored, records))
            stored = records
            results[str(records)] = {"bytes": fetch(url, SIZE), "rounds": defaultdict(list)}
            databases[str(records)] = url
        for size, url in databases.items():
            for variant in ("held", "log_l1", "request_id", "trace_id"):
                callers[size, variant] = stack.enter_context(caller(variant, url))
        for number in range(1, rounds + 1):
            say(f"3/5 growth: round {number} of {rounds}")
            for (size, variant), process in callers.items():
                results[size]["rounds"][variant].append(calls(process, 200))
    return results


def measure_round_trips(server_url: str, rounds: int) -> dict[str, Any]:
    """Statements on the wire for one record, and its time when each of them takes 1 ms longer."""
    results: dict[str, Any] = {}
    url = new_database(server_url)
    with ExitStack() as stack:
        callers = {}
        for variant in ("held", "log_l1", "orm"):
            wire = stack.enter_context(counted(url, delay=0.001))
            callers[variant] = (stack.enter_context(caller(variant, wire.url)), wire)
            results[variant] = {"rounds": []}
        for number in range(1, rounds + 1):
            say(f"4/5 round trips, 1 ms away: round {number} of {rounds}")
            for variant, (process, wire) in callers.items():
                before = wire.round_trips
                results[variant]["rounds"].append(calls(process, 100))
                results[variant]["round_trips"] = (wire.round_trips - before) / 100
    return results


def measure_spans(server_url: str, stops: int, seconds: float) -> dict[str, dict[str, int]]:
    """Stop the service with SIGTERM under full load; of the requests answered, count the traces that are whole."""
    results = {}
    url = new_database(server_url)
    for way in ("otlp", "token"):
        answered = whole = 0
        for number in range(1, stops + 1):
            say(f"5/5 spans, {way}: SIGTERM under load, {number} of {stops}")
            with otlp_receiver() as otlp, tempfile.TemporaryDirectory() as directory:
                with service(url, Path(directory, "log"), **exporting(otlp.endpoint)[way]) as running:
                    threading.Timer(seconds, running.process.terminate).start()
                    traces = load(running.port, 8, seconds + 10)["traces"]
                    running.process.wait(30)
                spans = by_trace(otlp.spans)
            answered += len(traces)
            whole += sum(is_whole(spans[trace]) for trace in traces)
        results[way] = {"answered": answered, "whole": whole, "stops": stops}
    return results


def describe_machine(server_url: str) -> dict[str, Any]:
    """Say what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    settings = ("server_version", "fsync", "synchronous_commit", "shared_buffers")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()}, {platform.machine()}",
        "python": platform.python_version(),
        "load_before": psutil.getloadavg()[0],
        **{name: fetch(server_url, f"SHOW {name}") for name in settings},
        "packages": {
            name: importlib.metadata.version(name)
            for name in ("fastapi", "uvicorn", "uvloop", "asyncpg", "sqlalchemy", "logfire", "opentelemetry-sdk")
        },
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--growth", action="store_true", help="grow to 5 million records, not 1")
    parser.add_argument("--smoke", action="store_true", help="a round of everything, to see that it works; no page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every round there")
    arguments = parser.parse_args()
    # No setting of a developer's shines through.
    for name in list(os.environ):
        if name.startswith(("LOGFIRE_", "OTEL_", "CC_", "PG")):
            del os.environ[name]
    start = time.monotonic()
    few = arguments.smoke
    sizes = (0, 100_000) if few else (0, 1_000_000, 5_000_000) if arguments.growth else (0, 1_000_000)
    rounds = {1: 1, 8: 2, 64: 1} if few else {1: 4, 8: 10, 64: 4}
    with temporary_home() as home, server(home) as server_url:
        results = {
            "machine": describe_machine(server_url),
            "log_l1": measure_log_l1(server_url, 2 if few else 40),
            "load": measure_load(server_url, rounds, 0.5 if few else 2),
            "growth": measure_growth(server_url, 2 if few else 15, sizes),
            "round_trips": measure_round_trips(server_url, 2 if few else 15),
            "spans": measure_spans(server_url, 1 if few else 4, 1 if few else 3),
        }
    results["machine"]["minutes"] = (time.monotonic() - start) / 60
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    report.print_tables(results)
    if not few:
        report.write_page(results)


if __name__ == "__main__":
    main()
