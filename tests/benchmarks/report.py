"""What the benchmark found: tables to print, docs/performance.md and its plots.

`python -m benchmarks.report FILE` writes the page anew from the file of `scripts/bench --json FILE`, and measures
nothing.
"""

import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from devtools import ROOT

Rounds = list[dict[str, float]]

NAMES: Final = {
    "held": "asyncpg, one held connection (floor)",
    "pool": "asyncpg, its own pool (second floor)",
    "pool_without_reset": "asyncpg, its own pool, no clean-up",
    "log_l1": "`log_l1`",
    "exporting": "`log_l1`, exporting OTLP",
    "orm": "ORM unit of work",
}
SERVICES: Final = {
    "floor": "bare FastAPI (floor)",
    "untraced": "cos-cc, nothing to export to",
    "otlp": "cos-cc, OTLP",
    "token": "cos-cc, `LOGFIRE_TOKEN`",
    "instrumented": "bare FastAPI, instrumented, OTLP",
}

Row = Sequence[str]


def mid(rounds: Rounds, key: str) -> float:
    """Return the median over the rounds."""
    return median(each[key] for each in rounds)


def ratio(rounds: Rounds, floor: Rounds, key: str) -> float:
    """Return the median of the ratios within a round, where both met the same machine."""
    return median(each[key] / base[key] for each, base in zip(rounds, floor, strict=True))


def tail(rounds: Rounds) -> float:
    """Return how many times the median of the requests the slowest hundredth takes."""
    return median(each["p99"] / each["p50"] for each in rounds)


def times(value: float) -> str:
    """Write a ratio."""
    return f"{value:.2f} x"


def log_l1_rows(results: dict[str, Any]) -> list[Row]:
    """Tabulate measurement 1."""
    rows: list[Row] = [("", "wall", "wall / pool", "CPU", "p50 ms", "p95 ms", "CPU ms")]
    measured = results["log_l1"]
    for variant, rounds in measured.items():
        ratios = [
            times(ratio(rounds, measured[floor], key))
            for floor, key in (("held", "p50"), ("pool", "p50"), ("held", "cpu"))
        ]
        rows.append((NAMES[variant], *ratios, *(f"{mid(rounds, key):.3f}" for key in ("p50", "p95", "cpu"))))
    return rows


def load_rows(results: dict[str, Any]) -> list[Row]:
    """Tabulate measurement 2."""
    rows: list[Row] = [
        ("", "connections", "CPU", "CPU ms", "requests/s", "per core", "p50 ms", "p95 ms", "p99 ms", "p99/p50")
    ]
    for connections, measured in results["load"].items():
        for variant, rounds in measured.items():
            cpu = mid(rounds, "cpu")
            walls = [f"{mid(rounds, key):.2f}" for key in ("p50", "p95", "p99")]
            rows.append(
                (
                    SERVICES[variant],
                    connections,
                    times(ratio(rounds, measured["floor"], "cpu")),
                    f"{cpu:.3f}",
                    f"{mid(rounds, 'rps'):.0f}",
                    f"{1e3 / cpu:.0f}",
                    *walls,
                    f"{tail(rounds):.1f}",
                )
            )
    return rows


def growth_rows(results: dict[str, Any]) -> list[Row]:
    """Tabulate measurement 3."""
    rows: list[Row] = [
        (
            "records stored",
            "`log_l1` p50",
            "p50 ms",
            "p95 ms",
            "floor p50 ms",
            "by request_id ms",
            "by trace_id ms",
            "bytes/record",
        )
    ]
    empty = results["growth"]["0"]["rounds"]["log_l1"]
    for size, measured in results["growth"].items():
        rounds = measured["rounds"]
        rows.append(
            (
                f"{int(size):,}",
                times(ratio(rounds["log_l1"], empty, "p50")),
                f"{mid(rounds['log_l1'], 'p50'):.3f}",
                f"{mid(rounds['log_l1'], 'p95'):.3f}",
                *(f"{mid(rounds[variant], 'p50'):.3f}" for variant in ("held", "request_id", "trace_id")),
                f"{measured['bytes'] / int(size):.0f}" if int(size) else "",
            )
        )
    return rows


def round_trip_rows(results: dict[str, Any]) -> list[Row]:
    """Tabulate measurement 4."""
    rows: list[Row] = [("1 ms away", "round trips", "wall", "p50 ms", "p95 ms")]
    measured = results["round_trips"]
    for variant, found in measured.items():
        rounds = found["rounds"]
        rows.append(
            (
                NAMES[variant],
                f"{found['round_trips']:g}",
                times(ratio(rounds, measured["held"]["rounds"], "p50")),
                *(f"{mid(rounds, key):.3f}" for key in ("p50", "p95")),
            )
        )
    return rows


def target_rows(results: dict[str, Any]) -> list[Row]:
    """Compare with what was to be reached."""
    calls, load, growth = results["log_l1"], results["load"]["8"], results["growth"]
    held = calls["held"]
    largest = max(growth, key=int)
    services = {"untraced": (2.0, "nothing to export to"), "otlp": (4.0, "OTLP"), "token": (4.5, "`LOGFIRE_TOKEN`")}
    eight = "8 connections"
    floor_tail = f"{eight}; floor {tail(load['floor']):.1f}"
    targets = (
        ("`log_l1` p95, ms", mid(calls["log_l1"], "p95"), "<", 2, f"floor {mid(held, 'p95'):.2f}"),
        ("`log_l1` median / asyncpg's pool", ratio(calls["log_l1"], calls["pool"], "p50"), "<=", 1.1, ""),
        ("`log_l1` median / held connection", ratio(calls["log_l1"], held, "p50"), "<=", 1.3, ""),
        ("`log_l1` CPU / held connection", ratio(calls["log_l1"], held, "cpu"), "<=", 2, ""),
        ("`log_l1` exporting, median / held connection", ratio(calls["exporting"], held, "p50"), "<=", 1.6, ""),
        ("ORM unit of work / `log_l1`, median", ratio(calls["orm"], calls["log_l1"], "p50"), ">=", 2, ""),
        *(
            (f"request, {name}, CPU / floor", ratio(load[key], load["floor"], "cpu"), "<=", limit, eight)
            for key, (limit, name) in services.items()
        ),
        *(
            (f"request, {name}, p99 / p50", tail(load[key]), "<=", 2.5, floor_tail)
            for key, (_, name) in services.items()
        ),
        (
            "instrumented FastAPI / cos-cc, OTLP, CPU",
            ratio(load["instrumented"], load["otlp"], "cpu"),
            ">=",
            1.5,
            eight,
        ),
        ("round trips of a `log_l1`", results["round_trips"]["log_l1"]["round_trips"], "<=", 1, ""),
        (
            f"`log_l1` beside {int(largest):,} records / beside none",
            ratio(growth[largest]["rounds"]["log_l1"], growth["0"]["rounds"]["log_l1"], "p50"),
            "<=",
            1.15,
            "",
        ),
        *(
            (
                f"traces that arrived whole, {services[way][1]}, %",
                100 * spans["whole"] / spans["answered"],
                ">=",
                100,
                f"{spans['whole']:,} of {spans['answered']:,} requests, {spans['stops']} stops",
            )
            for way, spans in results["spans"].items()
        ),
    )
    rows: list[Row] = [("", "measured", "target", "", "")]
    for name, value, sign, limit, note in targets:
        reached = {"<": value < limit, "<=": value <= limit, ">=": value >= limit}[sign]
        rows.append((name, f"{value:.4g}", f"{sign} {limit}", "reached" if reached else "**missed**", note))
    return rows


def markdown(rows: list[Row]) -> str:
    """Write a table in Markdown."""
    head, *body = rows
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(rows: list[Row]) -> str:
    """Write a table for a terminal."""
    columns = [[cell.translate(str.maketrans("", "", "`*")) for cell in column] for column in zip(*rows, strict=True)]
    padded = [
        [(cell.rjust if place else cell.ljust)(max(map(len, column))) for cell in column]
        for place, column in enumerate(columns)
    ]
    return "\n".join("  ".join(row) for row in zip(*padded, strict=True))


# --- plots ----------------------------------------------------------------------------------------------------------

COLOURS: Final = ("#8a94a6", "#2b6cb0", "#dd6b20", "#b83280", "#6b8e23", "#4a5568")


def plot_log_l1(results: dict[str, Any]) -> Figure:
    """Draw measurement 1: wall time and CPU of a call."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    wall, cpu = figure.subplots(1, 2, sharey=True)
    measured = results["log_l1"]
    names = [NAMES[variant].replace("`", "") for variant in measured]
    p50, p95, used = ([mid(rounds, key) for rounds in measured.values()] for key in ("p50", "p95", "cpu"))
    wall.barh(names, p50, color=COLOURS)
    wall.plot(p95, names, "|", color="black", markersize=14, label="p95")
    wall.axvline(2, color="#c53030", linestyle=":", label="target for p95")
    wall.set(title="wall time of a call, median, ms")
    wall.legend(frameon=False)
    wall.invert_yaxis()
    cpu.bar_label(cpu.barh(names, used, color=COLOURS), fmt="%.2f", padding=3)
    cpu.set(title="CPU time of a call, ms")
    return figure


def plot_load(results: dict[str, Any]) -> Figure:
    """Draw measurement 2: CPU of a request, and how long requests take."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    cpu, wall = figure.subplots(1, 2)
    for number, (variant, name) in enumerate(SERVICES.items()):
        label = name.replace("`", "")
        rounds = {connections: measured[variant] for connections, measured in results["load"].items()}
        places = [place + (number - 2) * 0.18 for place in range(len(rounds))]
        bars = cpu.bar(places, [mid(each, "cpu") for each in rounds.values()], 0.17, color=COLOURS[number], label=label)
        cpu.bar_label(bars, fmt="%.2f", fontsize=6)
        p50, p99 = ([mid(each, key) for each in rounds.values()] for key in ("p50", "p99"))
        wall.vlines(places, p50, p99, color=COLOURS[number], linewidth=4, alpha=0.5)
        wall.plot(places, p50, "o", color=COLOURS[number], label=label)
    for axes in (cpu, wall):
        axes.set_xticks(range(len(results["load"])), [f"{connections} conn." for connections in results["load"]])
    cpu.set(title="CPU time of a request, ms")
    wall.set(title="a request takes p50 (dot) to p99, ms", yscale="log")
    wall.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def plot_growth(results: dict[str, Any]) -> Figure:
    """Draw measurements 3 and 4: what does not grow, and what distance costs."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    size, distance = figure.subplots(1, 2)
    growth = results["growth"]
    labels = [f"{int(records) / 1e6:g} M" for records in growth]
    for number, (variant, name) in enumerate(
        (
            ("held", NAMES["held"]),
            ("log_l1", "log_l1"),
            ("request_id", "look-up by request_id"),
            ("trace_id", "look-up by trace_id"),
        )
    ):
        p50 = [mid(measured["rounds"][variant], "p50") for measured in growth.values()]
        size.plot(labels, p50, "o-", color=COLOURS[number], label=name)
    size.set(title="beside so many records, median, ms")
    size.set_ylim(0, 1.7 * size.get_ylim()[1])
    size.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    trips = results["round_trips"]
    names = [
        f"{NAMES[variant].replace('`', '')}\n{found['round_trips']:g} round trip(s)" for variant, found in trips.items()
    ]
    near = [mid(results["log_l1"][variant], "p50") for variant in trips]
    far = [mid(found["rounds"], "p50") for found in trips.values()]
    distance.barh(names, far, color=COLOURS[1], label="1 ms away")
    distance.barh(names, near, color=COLOURS[0], label="on the same machine")
    distance.invert_yaxis()
    distance.set(title="wall time of a call, median, ms")
    distance.legend(frameon=False, fontsize=8)
    return figure


def tables(results: dict[str, Any]) -> dict[str, list[Row]]:
    """Return every table by its name in the template; the targets come last, where a terminal shows them."""
    return {
        "log_l1": log_l1_rows(results),
        "load": load_rows(results),
        "growth": growth_rows(results),
        "round_trips": round_trip_rows(results),
        "targets": target_rows(results),
    }


def print_tables(results: dict[str, Any]) -> None:
    """Print all tables."""
    for rows in tables(results).values():
        print(plain(rows), end="\n\n")


def write_page(results: dict[str, Any]) -> None:
    """Write docs/performance.md and its plots."""
    docs = ROOT / "docs"
    # The same figures give the same files: text stays text, and ids are not random.
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        for name, draw in {"log_l1": plot_log_l1, "load": plot_load, "growth": plot_growth}.items():
            draw(results).savefig(docs / f"performance-{name}.svg", metadata={"Date": None})
    machine = results["machine"] | {
        f"{name}_{way}": f"{value:,}" for way, spans in results["spans"].items() for name, value in spans.items()
    }
    machine |= {
        "packages": ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
        "memory": f"{machine['memory'] / 2**30:.0f}",
        "minutes": f"{machine['minutes']:.0f}",
        "load_before": f"{machine['load_before']:.1f}",
    }
    template = string.Template((ROOT / "tests/benchmarks/performance.md").read_text())
    page = template.substitute(machine, **{name: markdown(rows) for name, rows in tables(results).items()})
    (docs / "performance.md").write_text(page)


if __name__ == "__main__":
    write_page(json.loads(Path(sys.argv[1]).read_text()))
