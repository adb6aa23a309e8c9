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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import asyncpg
import psutil
from sqlalchemy import make_url

import report
from devtools import ROOT
from devtools.otlp import otlp_receiver
from devtools.ports import free_port, listens
from devtools.postgres import server, temporary_home
from devtools.traces import by_trace, is_whole
from devtools.waiting import until
from devtools.wire import counted

HERE: Final = Path(__file__).resolve().parent
OURS: Final = "backend.cc.cc_main:app"
TOKEN: Final = "pylf_v1_us_0123456789"  # Logfire's SDK takes it for a token; it opens nothing

# No setting of a developer's shines through.
ENVIRONMENT: Final = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("LOGFIRE_", "OTEL_", "CC_", "PG"))},
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "scripts"), str(HERE)]),
}

Round = dict[str, float]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent of `values` are not above."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def say(text: str) -> None:
    """Show that it goes on."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


async def _fetch(url: str, statement: str, *values: object) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement, *values)
    finally:
        await connection.close()


def fetch(url: str, statement: str, *values: object) -> Any:
    """Run one statement and return the first value of its first row."""
    return asyncio.run(_fetch(url, statement, *values))


def new_database(server_url: str, template: str | None = None) -> str:
    """Create a database and return its URL: a copy of `template`, or by the real migrations."""
    name = f"bench_{uuid4().hex}"
    fetch(server_url, f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
    url = make_url(server_url).set(database=name).render_as_string(hide_password=False)
    if not template:
        command = [sys.executable, "-m", "alembic", "upgrade", "head"]
        subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | {"DATABASE_URL": url}, check=True, stderr=subprocess.DEVNULL
        )
    return url


@contextmanager
def child(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program until the block ends."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=ENVIRONMENT | environment,
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
        raise RuntimeError(f"{process.args!r} ended: see its message above")
    return text.strip()


@contextmanager
def receiver() -> Iterator[str]:
    """Run an OTLP receiver that keeps nothing, in a process of its own."""
    with child("-m", "devtools.otlp") as process:
        yield line(process)


@contextmanager
def caller(variant: str, url: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run calls.py; see there."""
    with child(str(HERE / "calls.py"), variant, DATABASE_URL=url, **environment) as process:
        line(process)
        yield process


def calls(process: subprocess.Popen[str], count: int) -> Round:
    """Let it make so many calls, and return what one took, in milliseconds."""
    assert process.stdin is not None
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    answer = json.loads(line(process))
    walls = answer["milliseconds"]
    return {"p50": percentile(walls, 50), "p95": percentile(walls, 95), "cpu": answer["cpu"]}


@contextmanager
def service(app: str, url: str, **environment: str) -> Iterator[tuple[psutil.Process, int]]:
    """Run uvicorn with one worker; yield it with its port."""
    port = free_port()
    options = ("--no-access-log", "--log-level=error", "--loop=uvloop", "--http=httptools", "--reset-contextvars")
    with child("-m", "uvicorn", app, f"--port={port}", *options, DATABASE_URL=url, **environment) as process:
        until(lambda: listens(port), 30, f"{app} listens")
        yield psutil.Process(process.pid), port


def load(port: int, connections: int, seconds: float) -> dict[str, Any]:
    """Run load.py; see there."""
    command = [sys.executable, str(HERE / "load.py"), str(port), str(connections), str(seconds)]
    # Into a file: a line as long as this one can reach the reader of a pipe in part.
    with tempfile.TemporaryFile("w+") as output:
        subprocess.run(command, env=ENVIRONMENT, stdout=output, check=True, timeout=seconds + 30)
        output.seek(0)
        answer: dict[str, Any] = json.load(output)
        return answer


# --- the five measurements ------------------------------------------------------------------------------------------


def measure_log_l1(server_url: str, rounds: int) -> dict[str, list[Round]]:
    """One durable record, one caller, connections warm."""
    results: dict[str, list[Round]] = defaultdict(list)
    url = new_database(server_url)
    with ExitStack() as stack:
        endpoint = stack.enter_context(receiver())
        callers = {
            "raw": stack.enter_context(caller("raw", url)),
            "pool": stack.enter_context(caller("pool", url)),
            "log_l1": stack.enter_context(caller("log_l1", url)),
            "exporting": stack.enter_context(caller("log_l1", url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)),
            "orm": stack.enter_context(caller("orm", url)),
        }
        for number in range(1, rounds + 1):
            say(f"1/5 log_l1: round {number} of {rounds}")
            for variant, process in callers.items():
                results[variant].append(calls(process, 200))
    return dict(results)


def measure_load(server_url: str, rounds: int, seconds: float) -> dict[str, dict[str, list[Round]]]:
    """POST /test-log as fast as one worker answers, on 1, 8 and 64 connections; on 8 twice as many rounds."""
    results: dict[str, dict[str, list[Round]]] = {}
    url = new_database(server_url)
    with ExitStack() as stack:
        otlp, logfire, other = (stack.enter_context(receiver()) for _ in range(3))
        services = {
            "floor": stack.enter_context(service("floor:app", url)),
            "ours": stack.enter_context(service(OURS, url)),
            "exporting": stack.enter_context(service(OURS, url, OTEL_EXPORTER_OTLP_ENDPOINT=otlp)),
            "token": stack.enter_context(service(OURS, url, LOGFIRE_TOKEN=TOKEN, LOGFIRE_BASE_URL=logfire)),
            "alternative": stack.enter_context(service("alternative:app", url, OTEL_EXPORTER_OTLP_ENDPOINT=other)),
        }
        for _, port in services.values():
            load(port, 8, seconds)
        for connections in (1, 8, 64):
            loads: dict[str, list[Round]] = defaultdict(list)
            cpu: dict[str, list[float]] = defaultdict(list)
            for number in range(1, (2 * rounds if connections == 8 else rounds) + 1):
                say(f"2/5 POST /test-log, {connections} connections: round {number} of {rounds}")
                for variant, (process, port) in services.items():
                    # Read just before a round: what a service still did after its last one, sending spans, counts.
                    cpu[variant].append(sum(process.cpu_times()[:2]))
                    loads[variant].append(_answers(load(port, connections, seconds)))
            for variant, (process, _) in services.items():
                cpu[variant].append(sum(process.cpu_times()[:2]))
                for done, before, after in zip(loads[variant], cpu[variant], cpu[variant][1:], strict=False):
                    done["cpu"] = (after - before) * 1e3 / done.pop("requests")
            results[str(connections)] = dict(loads)
    return results


def _answers(answer: dict[str, Any]) -> Round:
    if answer["failures"]:
        raise RuntimeError(f"{answer['failures']} requests were not answered 200")
    walls = answer["milliseconds"]
    result = {f"p{percent}": percentile(walls, percent) for percent in (50, 95, 99)}
    return result | {"requests": len(walls), "rps": len(walls) / answer["seconds"]}


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
        # The foreign keys hold by construction; checking five million of them would take longer than writing them.
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
            url = new_database(server_url, make_url(url).database if url else None)
            asyncio.run(_fill(url, stored, records))
            stored = records
            results[str(records)] = {"bytes": fetch(url, SIZE), "rounds": defaultdict(list)}
            databases[str(records)] = url
        for size, url in databases.items():
            for variant in ("raw", "log_l1", "request_id", "trace_id"):
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
        for variant in ("raw", "log_l1", "orm"):
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
    results: dict[str, dict[str, int]] = {}
    url = new_database(server_url)
    for destination in ("exporting", "token"):
        answered = whole = 0
        for number in range(1, stops + 1):
            say(f"5/5 spans: SIGTERM under load, {destination}, {number} of {stops}")
            with otlp_receiver() as otlp:
                environment = (
                    {"LOGFIRE_TOKEN": TOKEN, "LOGFIRE_BASE_URL": otlp.endpoint}
                    if destination == "token"
                    else {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint}
                )
                with service(OURS, url, **environment) as (process, port):
                    threading.Timer(seconds, process.send_signal, [signal.SIGTERM]).start()
                    traces = load(port, 8, seconds + 10)["traces"]
                    process.wait(30)
                spans = by_trace(otlp.spans)
            answered += len(traces)
            whole += sum(is_whole(spans[trace]) for trace in traces)
        results[destination] = {"answered": answered, "whole": whole, "stops": stops}
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
    parser.add_argument("--smoke", action="store_true", help="a round of everything, to see that it works; no figures")
    parser.add_argument("--json", type=Path, help="also write the figures of every round to this file")
    arguments = parser.parse_args()
    start = time.monotonic()
    few = arguments.smoke
    sizes = (0, 100_000) if few else (0, 1_000_000, 5_000_000) if arguments.growth else (0, 1_000_000)
    with temporary_home() as home, server(home) as server_url:
        results = {
            "machine": describe_machine(server_url),
            "log_l1": measure_log_l1(server_url, 2 if few else 30),
            "load": measure_load(server_url, 1 if few else 4, 0.5 if few else 2),
            "growth": measure_growth(server_url, 2 if few else 15, sizes),
            "round_trips": measure_round_trips(server_url, 2 if few else 15),
            "spans": measure_spans(server_url, 1 if few else 3, 1 if few else 3),
        }
    results["machine"]["minutes"] = (time.monotonic() - start) / 60
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, None if few else ROOT / "docs")


if __name__ == "__main__":
    main()
