"""The rules of the house that no other tool checks: which room may use which, and nothing private of a library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools import ROOT

PROGRAMS = [path for folder in ("src", "migrations", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]

MAY_USE = {
    "config": set(),
    "mem0_models": set(),
    "jsonb": set(),
    "errors": set(),
    "records": {"mem0_models"},
    "database": {"config", "errors"},
    "services.logging": {"database", "errors", "jsonb", "records"},
    "deps": {"services.logging", "errors", "records"},
    "exception_handlers": {"errors"},
    "routers.debug_router": {"deps", "exception_handlers", "errors", "jsonb", "mem0_models", "records"},
    "cc_main": {"routers", "exception_handlers", "database", "config"},
}
"""For each module of `backend.cc` the other ones that it may import. `common` may be used by all of them."""


def imported(path: Path) -> Iterator[str]:
    """Yield the name of each module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


@pytest.mark.parametrize("module", MAY_USE)
def test_a_room_uses_only_the_rooms_below_it(module: str) -> None:
    path = ROOT / f"src/backend/cc/{module.replace('.', '/')}.py"
    used = {name.removeprefix("backend.cc.") for name in imported(path) if name.startswith("backend.")}
    assert used <= MAY_USE[module]


def test_every_module_has_its_rule() -> None:
    found = {
        str(path.relative_to(ROOT / "src/backend/cc").with_suffix("")).replace("/", ".")
        for path in (ROOT / "src/backend/cc").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert found == MAY_USE.keys()


def test_common_knows_nothing_of_cc() -> None:
    for path in (ROOT / "src/common").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("backend")], path
        assert "mem0_cc" not in path.read_text()


def test_the_migrations_know_no_service_and_no_web_framework() -> None:
    names = set(imported(ROOT / "migrations/env.py"))
    assert {name for name in names if name.startswith("backend")} == {
        f"backend.cc.{module}" for module in ("config", "database", "errors", "mem0_models")
    }
    assert not {name for name in names if name.startswith(("fastapi", "starlette", "common"))}


def test_no_private_name_is_used_and_no_exception_made() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--ignore-noqa", "--select", "SLF001", "--no-cache"]
    checked = subprocess.run(
        [*command, "src", "migrations", "scripts"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def library_names(tree: ast.Module) -> set[str]:
    """Return the names that a module has from libraries."""
    ours = ("backend", "common", "devtools")
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(ours):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_a_library_is_replaced(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = library_names(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                assert target.value.id not in names, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            attribute = node.args[1]
            assert not (isinstance(attribute, ast.Constant) and str(attribute.value).startswith("_"))
            assert node.func.id != "setattr"
