import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from websockets.sync.client import connect

from devtools import ROOT
from devtools.service import running_service

SOCKET = """
from fastapi import WebSocket
from backend.cc.cc_main import app

@app.websocket("/socket")
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(websocket.state.request_id)
"""


def test_the_wheel_holds_the_service_and_nothing_else(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir=.", "."],
        cwd=tmp_path,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = {
        str(path.relative_to(ROOT / "src")) for kind in ("*.py", "py.typed") for path in (ROOT / "src").rglob(kind)
    }
    assert packed == source
    assert {"backend/py.typed", "common/py.typed"} <= packed


def test_every_step_of_the_check_is_a_step_of_ci() -> None:
    steps = re.findall(r"^(\w+)\(\) \{", (ROOT / "scripts/check").read_text(), re.MULTILINE)
    assert steps == re.findall(r"\./scripts/check (\w+)", (ROOT / ".github/workflows/ci.yml").read_text())


def test_what_the_service_depends_on_is_enough_for_a_websocket(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SOCKET)
    url, log = "postgresql://nobody@127.0.0.1:1/nothing", tmp_path / "log"
    with (
        running_service(url, log, f"--app-dir={tmp_path}", app="own:app") as service,
        connect(f"ws://127.0.0.1:{service.port}/socket", additional_headers={"X-Request-ID": "mine"}) as client,
    ):
        assert client.recv() == "mine"
