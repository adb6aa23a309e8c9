"""Measure what `log_l1` and tracing cost, each beside a floor, and write docs/performance.md. See scripts/bench.

What is compared takes turns, a short round of each, so that whatever else happens on the machine happens to all of it.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import asyncpg
import psutil

from benchmarks import report
from devtools import ROOT
from devtools.otlp import otlp_receiver
from devtools.postgres import server, temporary_home
from devtools.service import Service, running_service
from devtools.traces import by_trace, is_whole
from support.database import alembic_process, execute
from support.wire import counted

Round = dict[str, float]
Results = dict[str, dict[str, list[Round]]]  # by the number of callers, and by variant
Run = Callable[[int, float], Round]  # a round of so many callers and seconds

OURS: Final = "backend.cc.cc_main:app"
PLAN: Final = dict.fromkeys((1, 8, 64, 256), ("pool", "log_l1", "copy"))
SIZE: Final = """
    SELECT sum(pg_total_relation_size(oid)) / (SELECT count(*) FROM mem0_cc.base_log)
    FROM pg_class WHERE relnamespace = 'mem0_cc'::regnamespace AND relkind = 'r'"""


class Postgres:
    """The server that everything writes to."""

    def __init__(self, home: Path, url: str) -> None:
        self.url = url
        self._postmaster = psutil.Process(int((home / "data/postmaster.pid").read_text().split()[0]))
        alembic_process(url, "upgrade", "head").check_returncode()

    def cpu(self) -> float:
        """Return the CPU seconds of all its processes; the postmaster has those of its children that have ended."""
        while True:
            before = self._postmaster.cpu_times()
            seconds: float = sum(before[:4])
            for process in self._postmaster.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    seconds += sum(process.cpu_times()[:2])
            if self._postmaster.cpu_times()[2:4] == before[2:4]:  # none has ended meanwhile
                return seconds

    def fetch(self, query: str) -> Any:
        """Return the first value of a query."""

        async def fetch() -> Any:
            connection = await asyncpg.connect(self.url)
            value = await connection.fetchval(query)
            await connection.close()
            return value

        return asyncio.run(fetch())

    def empty(self) -> None:
        """Remove all records, so that no round meets the vacuum or the checkpoint that an earlier one has earned."""
        asyncio.run(execute(self.url, "TRUNCATE mem0_cc.base_log CASCADE", "CHECKPOINT"))

    def in_turns(self, into: Results, callers: int, rounds: int, variants: Mapping[str, Callable[[], Round]]) -> None:
        """Run a round of each variant, then the next one, in reverse order. The first round only warms up."""
        found = into.setdefault(str(callers), {variant: [] for variant in variants})
        for number in range(rounds + 1):
            print(f"{time.strftime('%H:%M:%S')}  {callers} callers: round {number} of {rounds}", file=sys.stderr)
            for variant in list(variants)[:: -1 if number % 2 else 1]:
                self.empty()
                result = variants[variant]()
                if number:
                    found[variant].append(result)


@contextmanager
def child(*arguments: str, **environment: str) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Run a module of Python until the block ends. Yields the first line that it prints, and a way to ask for more."""
    command, variables = [sys.executable, "-m", *arguments], os.environ | environment
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:

        def ask(question: str = "") -> str:
            assert process.stdin and process.stdout  # noqa: PT018 - for mypy
            process.stdin.write(question)
            return process.stdout.readline().strip()

        try:
            yield ask(), ask
        finally:
            process.terminate()


@contextmanager
def caller(postgres: Postgres, variant: str, **environment: str) -> Iterator[Run]:
    """Run benchmarks/calls.py until the block ends.

    CPU is in µs for each record or request: `client` is the callers', `server` PostgreSQL's, `cpu` both together.
    """

    def run(callers: int, seconds: float) -> Round:
        before = postgres.cpu()
        answer: Round = json.loads(ask(f"{callers} {seconds}\n"))
        answer["server"] = (postgres.cpu() - before) * 1e6 / answer["count"]
        answer["client"] *= 1e6 / answer["count"]
        return answer | {"cpu": answer["client"] + answer["server"]}

    with child("benchmarks.calls", variant, **{"DATABASE_URL": postgres.url} | environment) as (_, ask):
        yield run


@contextmanager
def service(postgres: Postgres, app: str = OURS, **environment: str) -> Iterator[tuple[Service, Run]]:
    """Run an application with one worker, and a caller of it. The `cpu` of a round is the service's alone."""
    cpu = [0.0]

    def run(connections: int, seconds: float) -> Round:
        answer = post(connections, seconds)
        # Since the end of the last round, because spans are sent in batches, some of them after a round.
        cpu.append(sum(psutil.Process(running.process.pid).cpu_times()[:2]))
        return answer | {"cpu": (cpu[-1] - cpu[-2]) * 1e6 / answer["count"]}

    # No connection is closed between two rounds.
    options = ("--app-dir=tests", "--no-access-log", "--log-level=error", "--timeout-keep-alive=3600")
    with (
        tempfile.NamedTemporaryFile() as log,
        running_service(postgres.url, Path(log.name), *options, app=app, **environment) as running,
        caller(postgres, "post", PORT=str(running.port)) as post,
    ):
        yield running, run


def exporting(endpoint: str) -> dict[str, dict[str, str]]:
    """Return the environment of a service that sends its spans to `endpoint`, by the way of sending."""
    return {
        "otlp": {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
        "token": {"LOGFIRE_TOKEN": "pylf_v1_us_0123456789", "LOGFIRE_BASE_URL": endpoint},
    }


def measure_records(
    results: Results, postgres: Postgres, rounds: int, seconds: float, plan: Mapping[int, Sequence[str]] = PLAN
) -> None:
    """Records of one process, by the number of its concurrent callers; a number after `log_l1` is a batch's size."""
    with ExitStack() as stack:
        run = {
            variant: stack.enter_context(caller(postgres, name, CC_DB_BATCH_SIZE=size))
            for variant in next(iter(plan.values()))
            for name, _, size in [variant.partition(" ")]
        }
        for callers, variants in plan.items():
            # COPY has a caller for each of its connections, and the ten of asyncpg's pool at most.
            most = {"copy": min(callers, 10)}
            turns = {each: partial(run[each], most.get(each, callers), seconds) for each in variants}
            postgres.in_turns(results, callers, rounds, turns)


def measure_lone(results: dict[str, float], postgres: Postgres, _: int, seconds: float) -> None:
    """How often a lone `log_l1` waits for the server, counted on the wire, and how much disk its record takes."""
    with counted(postgres.url) as wire, caller(postgres, "log_l1", DATABASE_URL=wire.url) as run:
        before = wire.round_trips
        count = run(1, seconds)["count"]
        results |= {"round_trips": (wire.round_trips - before) / count, "bytes": float(postgres.fetch(SIZE))}


def measure_requests(results: Results, postgres: Postgres, rounds: int, seconds: float) -> None:
    """POST /test-log as fast as one worker answers, by the number of connections."""
    with ExitStack() as stack:
        ways = exporting(stack.enter_context(child("devtools.otlp"))[0])
        applications: dict[str, tuple[str, dict[str, str]]] = {
            "bare": ("benchmarks.floor:app", {}),
            "untraced": (OURS, {}),
            "otlp": (OURS, ways["otlp"]),
            "token": (OURS, ways["token"]),
            "instrumented": ("benchmarks.floor:app", ways["otlp"]),
        }
        run = {name: stack.enter_context(service(postgres, app, **env))[1] for name, (app, env) in applications.items()}
        for connections in (8, 64):
            turns = {name: partial(each, connections, seconds) for name, each in run.items()}
            postgres.in_turns(results, connections, rounds, turns)


def measure_traces(results: dict[str, dict[str, int]], postgres: Postgres, _: int, seconds: float) -> None:
    """Stop the service with SIGTERM under full load; of the traces that the rows name, count those that are whole."""
    for way in exporting(""):
        count = results.setdefault(way, {"stored": 0, "whole": 0})
        postgres.empty()
        with otlp_receiver() as otlp:
            with service(postgres, **exporting(otlp.endpoint)[way]) as (running, run):
                threading.Timer(seconds, running.process.terminate).start()
                run(8, seconds + 10)
                running.process.wait(30)
            spans = by_trace(otlp.spans)
        traces = postgres.fetch("SELECT array_agg(DISTINCT trace_id) FROM mem0_cc.base_log")
        count["stored"] += len(traces)
        count["whole"] += sum(is_whole(spans[trace]) for trace in traces)


# What is measured, and how: in so many new processes, since one can be a tenth faster than another that does the same;
# in each of them so many rounds of so many seconds.
MEASUREMENTS: Final[dict[str, tuple[Callable[[Any, Postgres, int, float], None], int, int, float]]] = {
    "records": (measure_records, 4, 3, 1.2),
    "lone": (measure_lone, 1, 1, 1),
    "requests": (measure_requests, 5, 2, 1.5),
    "traces": (measure_traces, 2, 1, 3),
    "batch": (partial(measure_records, plan={256: ("log_l1", "log_l1 64", "log_l1 256")}), 4, 3, 1.2),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="measure this, and write no page")
    parser.add_argument("--smoke", action="store_true", help="a short round of each, to see that it works; no page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every round there")
    arguments = parser.parse_args()
    # No setting of a developer's shines through.
    for name in list(os.environ):
        if name.startswith(("LOGFIRE_", "OTEL_", "CC_", "PG")):
            del os.environ[name]
    names = ("asyncpg", "fastapi", "logfire", "sqlalchemy", "uvloop")
    with temporary_home() as home, server(home) as url:
        postgres = Postgres(home, url)
        results: dict[str, Any] = {name: {} for name in arguments.only or list(MEASUREMENTS)[:-1]}
        for name, found in results.items():
            measure, processes, rounds, seconds = MEASUREMENTS[name]
            if arguments.smoke:
                processes, rounds, seconds = 1, 1, seconds / 10
            for _ in range(processes):
                measure(found, postgres, rounds, seconds)
        results["machine"] = {
            "date": datetime.now(UTC).date().isoformat(),
            "cpu": Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0],
            "cores": psutil.cpu_count(),
            "python": platform.python_version(),
            "postgres": postgres.fetch("SHOW server_version"),
            "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    for name, table in report.tables(results).items():
        print(f"\n{name}\n{table}")
    if not (arguments.smoke or arguments.only):
        report.write_page(results)


if __name__ == "__main__":
    main()
