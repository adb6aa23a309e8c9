"""Take docs/phase2/trace.png: the viewer's own page, with the trace of a `POST /test-log` that was just sent."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Browser, sync_playwright  # type: ignore[import-not-found,unused-ignore]

from devtools import ROOT
from devtools.waiting import until

WIDTH: Final = 1120  # of the browser's window, in CSS pixels: the viewer needs this many for two columns

BODY: Final = {"content": "Paris?", "tokens_in": 3, "event_type": "model.answered", "payload": {"model": "small"}}


def take(browser: Browser, printed: str) -> None:
    """Send requests to the service that printed this, and picture the last one's trace."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400}, device_scale_factor=1.5)
    (url,) = re.findall(r"http://\S+/test-log", printed)
    page.request.post(url, data=BODY)  # also connects to the database
    request_id = page.request.post(url, data=BODY).json()["request_id"]
    ((viewer, password),) = re.findall(r"(http://[^/]+)/#\S+ \(password: (\S+)\)", printed)
    page.request.post(f"{viewer}/api/login", data={"password": password})

    def arrived() -> list[dict[str, Any]]:
        runs = page.request.get(f"{viewer}/api/projects/cos-cc/runs?meta=request_id:{request_id}").json()["items"]
        spans = page.request.get(f"{viewer}/api/traces/{runs[0]['trace_id']}").json()["runs"] if runs else []
        return spans if len(spans) == 3 else []  # noqa: PLR2004 - the server's, and one for each record

    server, prompt, _ = until(arrived, 20, "the trace arrives")
    page.goto(f"{viewer}/#/t/{server['trace_id']}")
    page.get_by_text("Metadata", exact=True).click()
    page.locator(f"[data-id='{prompt['id']}']").click()
    page.locator(".side h2", has_text=prompt["name"]).wait_for()
    end = page.locator(".side .sec").first.bounding_box() or {"y": 0, "height": 600}
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + 12}
    page.screenshot(clip=clip, path=ROOT / "docs/phase2/trace.png")


if __name__ == "__main__":
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("pictures: chromium or google-chrome must be on the PATH (Debian: apt install chromium)")
    with sync_playwright() as playwright, tempfile.NamedTemporaryFile() as output:
        # Chromium has no sandbox as root. It sees nothing but pages on the loopback interface.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        service = subprocess.Popen([ROOT / "scripts/serve", "--traces"], stdout=output, stderr=output)
        path = Path(output.name)
        try:
            until(lambda: "\nSee " in path.read_text() or service.poll() is not None, 120, "the service is ready")
            if service.poll() is not None:
                sys.exit(path.read_text())
            take(browser, path.read_text())
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(30)
