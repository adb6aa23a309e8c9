import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from devtools import ROOT


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
