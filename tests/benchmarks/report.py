"""What the benchmark found: tables for a terminal, docs/performance.md and its picture.

`python -m benchmarks.report FILE` writes the page anew from the file of `scripts/bench --json FILE`.
"""

import json
import string
import sys
from collections.abc import Callable
from itertools import starmap
from pathlib import Path
from statistics import median
from typing import Any, Final

from devtools import ROOT

Rounds = list[dict[str, float]]
Rows = list[tuple[str, ...]]

NAMES: Final = {
    "pool": "asyncpg's pool",
    "log_l1": "`log_l1`",
    "copy": "COPY",
    "bare": "bare",
    "untraced": "cos-cc, nothing to export to",
    "otlp": "cos-cc, OTLP",
    "token": "cos-cc, `LOGFIRE_TOKEN`",
    "instrumented": "instrumented, OTLP",
}
COLOURS: Final = {"pool": "#8a94a6", "log_l1": "#2b6cb0"}


def mid(rounds: Rounds, key: str) -> float:
    """Return the median over the rounds."""
    return median(each[key] for each in rounds)


def ratio(rounds: Rounds, floor: Rounds, key: str) -> float:
    """Return the median of the ratios within a round, where both met the same machine."""
    return median(each[key] / base[key] for each, base in zip(rounds, floor, strict=True))


def markdown(rows: Rows) -> str:
    """Write a table in Markdown, its columns aligned for a terminal."""
    lines = [rows[0], ("---", *["--:"] * (len(rows[0]) - 1)), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def record_rows(records: dict[str, Any], key: str, style: str) -> Rows:
    """Tabulate a figure of each way of writing, by the number of callers."""
    rows: Rows = [("callers", *records)]
    for variant in next(iter(records.values())):
        if (variant, key) != ("copy", "p99"):  # a COPY's time is a whole transaction's
            cells = [format(mid(found[variant], key), style) for found in records.values()]
            rows.append((NAMES.get(variant, variant), *cells))
    if all("pool" in found for found in records.values()):
        ratios = [f"**{ratio(found['log_l1'], found['pool'], key):.2f}**" for found in records.values()]
        rows.append(("`log_l1` / pool", *ratios))
    return rows


def request_rows(requests: dict[str, Any]) -> Rows:
    """Tabulate what a request costs; a cell has a figure for each number of connections."""
    columns: dict[str, Callable[[Rounds, Rounds], str]] = {
        "CPU ms": lambda rounds, _: f"{mid(rounds, 'cpu') / 1e3:.2f}",
        "CPU / bare": lambda rounds, bare: f"**{ratio(rounds, bare, 'cpu'):.2f}**",
        "PostgreSQL / bare": lambda rounds, bare: f"{ratio(rounds, bare, 'server'):.2f}",
        "requests/s": lambda rounds, _: f"{mid(rounds, 'rate'):,.0f}",
        "p99 / p50": lambda rounds, _: f"{median(each['p99'] / each['p50'] for each in rounds):.1f}",
    }
    rows: Rows = [(f"{', '.join(requests)} connections", *columns)]
    for variant in next(iter(requests.values())):
        pairs = [(found[variant], found["bare"]) for found in requests.values()]
        rows.append((NAMES[variant], *(", ".join(starmap(write, pairs)) for write in columns.values())))
    return rows


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return tables in Markdown, by their names in the template."""
    found = {}
    for part in {"records", "batch"} & results.keys():
        for key, style in (("rate", ",.0f"), ("cpu", ".0f"), ("p99", ".1f")):
            found[f"{part}_{key}"] = markdown(record_rows(results[part], key, style))
    if "requests" in results:
        found["requests"] = markdown(request_rows(results["requests"]))
    return found


def picture(records: dict[str, Any]) -> str:
    """Draw records/s by the number of callers, as an SVG."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 230" font-family="sans-serif" font-size="12">'
    parts = [head, '<rect width="740" height="230" fill="white"/>']
    for place, (variant, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{20 + 120 * place}" y="21" fill="{colour}">■ {NAMES[variant].strip("`")}</text>')
    top = max(mid(found[variant], "rate") for found in records.values() for variant in COLOURS)
    x = 20
    for callers, found in records.items():
        parts.append(f'<text x="{x}" y="222">{callers} caller{"s" * (callers != "1")}</text>')
        for variant, colour in COLOURS.items():
            height = round(150 * (rate := mid(found[variant], "rate")) / top)
            parts.append(f'<rect x="{x}" y="{204 - height}" width="64" height="{height}" fill="{colour}"/>')
            parts.append(f'<text x="{x + 32}" y="{199 - height}" text-anchor="middle">{rate:,.0f}</text>')
            x += 68
        x += 36
    return "\n".join([*parts, "</svg>\n"])


def write_page(results: dict[str, Any]) -> None:
    records = results["records"]
    lone, most = records["1"], records["256"]
    values = results["machine"] | tables(results)
    values["over_copy"] = f"{ratio(most['log_l1'], most['copy'], 'rate'):.2f}"
    values |= {key: f"{mid(lone['log_l1'], key):.2f}" for key in ("p50", "p95")}
    values |= {key: f"{value:.3g}" for key, value in results["lone"].items()}
    for way, count in results["traces"].items():
        values |= {f"{name}_{way}": f"{value:,}" for name, value in count.items()}
    template = string.Template((ROOT / "tests/benchmarks/performance.md").read_text())
    (ROOT / "docs/performance.md").write_text(template.substitute(values))
    (ROOT / "docs/performance.svg").write_text(picture(records))


if __name__ == "__main__":
    write_page(json.loads(Path(sys.argv[1]).read_text()))
