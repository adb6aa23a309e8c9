"""Take the pictures of docs/phase2: what scripts/pictures does once everything is installed.

`terminal.png` is what `./scripts/serve` prints, with one request in it. `trace.png` is the viewer's own page, with the
trace of a `POST /test-log` that was just sent. `rows.png` is what psql answers to a query for the id of that request.
"""

import base64
import html
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Browser, sync_playwright  # type: ignore[import-not-found,unused-ignore]

from devtools import ROOT
from devtools.waiting import until

WIDTH: Final = 1120  # of the browser's window, in CSS pixels: the viewer needs this many for two columns

BODY: Final = {"content": "Paris?", "tokens_in": 3, "event_type": "model.answered", "payload": {"model": "small"}}

QUERY: Final = "SELECT * FROM mem0_cc.base_log JOIN mem0_cc.{} ON base_log_id = id WHERE request_id = '{}'"

STYLE: Final = f"""\
body {{ margin: 0; padding: 20px; width: {WIDTH}px; background: #f6f7f9; color: #1d2330; font: 15px sans-serif }}
img {{ display: block; width: 100% }} div {{ width: 50% }}
pre {{ margin: 0; padding: 16px; background: #223; color: #eee; font: 12.5px/1.5 monospace; white-space: pre-wrap }}
"""


@contextmanager
def serving(*arguments: str) -> Iterator[Path]:
    """Run `./scripts/serve` until a Ctrl-C. Yields the file with its output, once it is ready."""
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen([ROOT / "scripts/serve", *arguments], stdout=output, stderr=output)
        path = Path(output.name)
        try:
            until(lambda: "\nSee " in path.read_text() or process.poll() is not None, 120, "the service is ready")
            if process.poll() is not None:
                sys.exit(path.read_text())
            yield path
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def send(browser: Browser, output: Path) -> str:
    """Send the request that the pictures show, and return its id."""
    (url,) = re.findall(r"http://\S+/test-log", output.read_text())
    return str(browser.new_page().request.post(url, data=BODY).json()["request_id"])


def trace(browser: Browser, viewer: str, password: str, request_id: str) -> str:
    """Return as HTML the viewer's page with a `log_l1` selected, and what it shows of the server span."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400}, device_scale_factor=1.5)
    page.request.post(f"{viewer}/api/login", data={"password": password})

    def arrived() -> list[dict[str, Any]]:
        runs = page.request.get(f"{viewer}/api/projects/cos-cc/runs?meta=request_id:{request_id}").json()["items"]
        spans = page.request.get(f"{viewer}/api/traces/{runs[0]['trace_id']}").json()["runs"] if runs else []
        return spans if len(spans) == 3 else []  # noqa: PLR2004 - the server's, and one for each record

    server, prompt, _ = until(arrived, 20, "the trace arrives")
    page.goto(f"{viewer}/#/t/{server['trace_id']}")
    page.get_by_text("Metadata", exact=True).click()
    metadata = page.locator(".side .sec").first
    parts = []
    for span in (server, prompt):
        page.locator(f"[data-id='{span['id']}']").click()
        page.locator(".side h2", has_text=span["name"]).wait_for()
        parts.append(metadata.screenshot())
    end = metadata.bounding_box() or {"y": 0, "height": 600}
    whole = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + 12})
    return f"{image(whole)}<p>The same for {server['name']}:</p><div>{image(parts[0])}</div>"


def image(png: bytes) -> str:
    """Return a picture as HTML."""
    return f"<img src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def take(browser: Browser, name: str, content: str) -> None:
    """Picture HTML, as docs/phase2/<name>.png."""
    page = browser.new_page(viewport={"width": WIDTH + 40, "height": 100}, device_scale_factor=1.5)
    page.set_content(f"<style>{STYLE}</style>{content}")
    page.screenshot(path=ROOT / f"docs/phase2/{name}.png", full_page=True)


def main() -> None:
    """Take the pictures."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("pictures: chromium or google-chrome must be on the PATH (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        # Chromium has no sandbox as root. It sees nothing but pages on the loopback interface.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        with serving() as output:
            send(browser, output)
            until(lambda: "log_l1 model.answered" in output.read_text(), 20, "the spans are printed")
            take(browser, "terminal", f"<pre>$ ./scripts/serve\n{html.escape(output.read_text())}</pre>")
        with serving("--traces") as output:
            ((viewer, password),) = re.findall(r"(http://[^/]+)/#\S+ \(password: (\S+)\)", output.read_text())
            send(browser, output)  # the first request also connects to the database
            request_id = send(browser, output)
            take(browser, "trace", trace(browser, viewer, password, request_id))
        queries = (QUERY.format(table, request_id) for table in ("prompt_trace", "event_log"))
        command = " \\\n  ".join(['psql "$DATABASE_URL" --expanded', *(f'-c "{query}"' for query in queries)])
        printed = f"$ {command}\n{subprocess.check_output(['sh', '-c', command], text=True).rstrip()}"
        take(browser, "rows", f"<pre>{html.escape(printed)}</pre>")


if __name__ == "__main__":
    main()
