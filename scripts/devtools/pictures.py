"""Take the pictures of docs/phase2: what scripts/pictures does once everything is installed.

`trace.png` is the viewer's own page in a browser, showing the trace of a `POST /test-log` that was sent a moment
before. `rows.png` is a page made here of what a query for the same request id answers.
"""

import asyncio
import base64
import html
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
from playwright.sync_api import Browser, Page, sync_playwright  # type: ignore[import-not-found,unused-ignore]

from devtools import ROOT
from devtools.ports import free_port
from devtools.waiting import until

PICTURES: Final = ROOT / "docs/phase2"

WIDTH: Final = 1120
"""Of the browser's window, in CSS pixels: the viewer needs this many for two columns."""

SPANS: Final = 5
"""Of a `POST /test-log`: the server's, and for each record `log_l1` and its SQL statement."""

BODY: Final = {
    "role": "assistant",
    "content": "Paris is the capital of France.",
    "tokens_in": 12,
    "tokens_out": 7,
    "event_type": "model.answered",
    "payload": {"model": "small", "cached": False},
}

QUERY: Final = """\
SELECT *
FROM mem0_cc.base_log
JOIN mem0_cc.{table} ON base_log_id = id
WHERE request_id = '{request_id}'"""

BROWSER: Final = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
"""Chromium's arguments. It sees two pages of ours on loopback, and has no sandbox as root."""

STYLE: Final = f"""\
body {{ margin: 0; padding: 20px; width: {WIDTH}px; background: #f6f7f9; color: #1d2330; font: 15px/1.5 sans-serif }}
h2 {{ font-size: 15px; margin: 14px 0 8px }}
.row {{ display: flex; gap: 20px }} .row div {{ flex: 1 }}
img {{ display: block; width: 100% }}
pre, table {{ font: 12.5px/1.5 monospace; margin: 0 0 10px }}
table {{ border-collapse: collapse; background: #fff }}
td, th {{ border: 1px solid #d5dae3; padding: 4px 10px; text-align: left }}
th {{ background: #eef0f4; font-weight: normal }}
"""


@contextmanager
def service() -> Iterator[str]:
    """Run `./scripts/serve --traces` on ports of its own. Yields all that it has printed until it was ready.

    Raises:
        RuntimeError: It has ended before.
    """
    ports = {name: str(free_port()) for name in ("PORT", "TRACES_PORT")}
    process = subprocess.Popen(
        [ROOT / "scripts/serve", "--traces"],
        env={**os.environ, **ports},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed = ""
        for line in process.stdout or ():
            printed += line
            if "password" in printed and "curl" in printed:
                yield printed
                return
        raise RuntimeError(f"the service did not start:\n{printed}")
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a Ctrl-C does
        process.communicate(timeout=30)


def post(host: str) -> dict[str, str]:
    """Send the request that the pictures show, and return the answer."""
    connection = http.client.HTTPConnection(host)
    connection.request("POST", "/test-log", json.dumps(BODY), {"content-type": "application/json"})
    answer: dict[str, str] = json.load(connection.getresponse())
    connection.close()
    return answer


def picture_trace(browser: Browser, viewer: str, password: str, request_id: str) -> None:
    """Picture the trace of a request: the viewer's page with `log_l1` selected, and what it shows of two more spans."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400}, device_scale_factor=2)
    origin = viewer.partition("/#")[0]
    page.request.post(f"{origin}/api/login", data={"password": password})
    server, log, sql, *_ = wait_for_trace(page, origin, request_id)
    page.goto(f"{origin}/#/t/{server['trace_id']}")
    page.get_by_text("Metadata", exact=True).click()
    pictures = {}
    for run in (server, sql, log):
        page.locator(f"[data-id='{run['id']}']").click()
        page.locator(".side h2", has_text=run["name"]).wait_for()
        pictures[run["id"]] = page.locator(".side .sec").first.screenshot()
    end = page.locator(".side .sec").first.bounding_box() or {"y": 0, "height": 600}
    whole = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + 12})
    page.close()

    take(
        browser,
        f"<img src='{data_url(whole)}'><div class=row>"
        f"<div><h2>The same for POST /test-log</h2><img src='{data_url(pictures[server['id']])}'></div>"
        f"<div><h2>The same for {html.escape(sql['name'])}</h2><img src='{data_url(pictures[sql['id']])}'></div></div>",
        PICTURES / "trace.png",
    )


def wait_for_trace(page: Page, origin: str, request_id: str) -> list[dict[str, Any]]:
    """Wait until all spans of a request have arrived. Returns them, the server span first, parents before children."""

    def arrived() -> list[dict[str, Any]]:
        found = page.request.get(f"{origin}/api/projects/cos-cc/runs?meta=request_id:{request_id}").json()["items"]
        if not found:
            return []
        runs: list[dict[str, Any]] = page.request.get(f"{origin}/api/traces/{found[0]['trace_id']}").json()["runs"]
        return runs if len(runs) == SPANS else []

    return until(arrived, 20, "the trace arrives")


def take(browser: Browser, content: str, path: Path) -> None:
    """Picture a page of ours.

    Args:
        browser: The browser.
        content: The page's HTML.
        path: Where the picture goes.
    """
    page = browser.new_page(viewport={"width": WIDTH + 40, "height": 100}, device_scale_factor=2)
    page.set_content(f"<style>{STYLE}</style>{content}")
    page.screenshot(path=path, full_page=True)
    page.close()


async def tables(request_id: str) -> str:
    """Ask for the rows. Returns HTML: each query, and its answer."""
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    try:
        page = ""
        for table in ("prompt_trace", "event_log"):
            query = QUERY.format(table=table, request_id=request_id)
            (row,) = await connection.fetch(query)
            cells = "".join(
                f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in row.items()
            )
            page += f"<div><pre>{html.escape(query)}</pre><table>{cells}</table></div>"
        return page
    finally:
        await connection.close()


def data_url(png: bytes) -> str:
    """Return a picture as an address that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def main() -> None:
    """Take both pictures.

    Raises:
        SystemExit: There is no browser.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("pictures: neither chromium nor google-chrome is on the PATH (Debian: apt install chromium)")
    with service() as printed:
        url = re.search(r"http://(\S+)/test-log", printed)
        viewer = re.search(r"(http://\S+) \(password: (\S+)\)", printed)
        if url is None or viewer is None:
            sys.exit(f"pictures: what scripts/serve prints has changed:\n{printed}")
        post(url[1])  # the first request also connects to the database
        request_id = post(url[1])["request_id"]
        rows = asyncio.run(tables(request_id))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER)
            picture_trace(browser, viewer[1], viewer[2], request_id)
            take(browser, f"<div class=row>{rows}</div>", PICTURES / "rows.png")
            browser.close()


if __name__ == "__main__":
    main()
