"""Take the pictures of docs/phase2: what scripts/pictures does once everything is installed.

`trace.png` is the viewer's own page in a browser, showing the trace of a `POST /test-log` that was sent a moment
before. `rows.png` and `terminal.png` are pages made here: what a query for the same request id answers, and what
`./scripts/serve` has printed.
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
import tempfile
from collections.abc import Callable, Iterator
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

SPANS: Final = 3
"""Of a `POST /test-log`: the server's, and `log_l1` for each record."""

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
.terminal {{ background: #1d2330; color: #e6e9ef; padding: 18px 22px; border-radius: 8px; font-size: 15px }}
"""


@contextmanager
def service() -> Iterator[Callable[[], str]]:
    """Run `./scripts/serve --traces` on its usual port. Yields a function that returns what it has printed so far."""
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(
            [ROOT / "scripts/serve", "--traces"],
            env={**os.environ, "TRACES_PORT": str(free_port())},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

        def printed() -> str:
            return Path(output.name).read_text()

        try:
            until(lambda: process.poll() is not None or ("password" in printed() and "curl" in printed()), 60)
            yield printed
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as a Ctrl-C does
            process.wait(30)


def post(host: str) -> dict[str, str]:
    """Send the request that the pictures show, and return the answer."""
    connection = http.client.HTTPConnection(host)
    connection.request("POST", "/test-log", json.dumps(BODY), {"content-type": "application/json"})
    answer: dict[str, str] = json.load(connection.getresponse())
    connection.close()
    return answer


def picture_trace(browser: Browser, viewer: str, password: str, request_id: str) -> None:
    """Picture the trace of a request: the viewer's page with `log_l1` selected, and what it shows of two more spans."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400}, device_scale_factor=1.5)
    origin = viewer.partition("/#")[0]
    page.request.post(f"{origin}/api/login", data={"password": password})
    server, log, other = wait_for_trace(page, origin, request_id)
    page.goto(f"{origin}/#/t/{server['trace_id']}")
    page.get_by_text("Metadata", exact=True).click()
    pictures = {}
    for run in (server, other, log):
        page.locator(f"[data-id='{run['id']}']").click()
        page.locator(".side h2", has_text=run["name"]).wait_for()
        page.wait_for_timeout(300)  # both records' spans have one name: the page gives no other sign
        pictures[run["id"]] = page.locator(".side .sec").first.screenshot()
    end = page.locator(".side .sec").first.bounding_box() or {"y": 0, "height": 600}
    whole = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + 12})
    page.close()

    take(
        browser,
        f"<img src='{data_url(whole)}'><div class=row>"
        f"<div><h2>The same for POST /test-log</h2><img src='{data_url(pictures[server['id']])}'></div>"
        f"<div><h2>The same for the second log_l1</h2><img src='{data_url(pictures[other['id']])}'></div></div>",
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
    page = browser.new_page(viewport={"width": WIDTH + 40, "height": 100}, device_scale_factor=1.5)
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


def terminal(printed: str) -> str:
    """Return what the service has printed as HTML, but for the viewer's password."""
    lines = [line for line in printed.strip().splitlines() if "password" not in line]
    text = html.escape("\n".join(["$ ./scripts/serve", *lines]))
    text = re.sub(r"^\d\d:\d\d:\d\d\.\d+", r"<span style='color:#7ec97e'>\g<0></span>", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return f"<pre class=terminal>{text}</pre>"


def data_url(png: bytes) -> str:
    """Return a picture as an address that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def main() -> None:
    """Take the pictures.

    Raises:
        SystemExit: There is no browser.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("pictures: neither chromium nor google-chrome is on the PATH (Debian: apt install chromium)")
    with service() as printed:
        url = re.search(r"http://(\S+)/test-log", printed())
        viewer = re.search(r"(http://\S+) \(password: (\S+)\)", printed())
        if url is None or viewer is None:
            sys.exit(f"pictures: what scripts/serve prints has changed:\n{printed()}")
        post(url[1])  # the first request also connects to the database
        request_id = post(url[1])["request_id"]
        screen = terminal(printed())
        rows = asyncio.run(tables(request_id))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER)
            picture_trace(browser, viewer[1], viewer[2], request_id)
            take(browser, f"<div class=row>{rows}</div>", PICTURES / "rows.png")
            take(browser, screen, PICTURES / "terminal.png")
            browser.close()


if __name__ == "__main__":
    main()
