"""The rule of the house that no other tool checks: which room may use which."""

import ast
from collections.abc import Iterator
from pathlib import Path

from devtools import ROOT

ROOMS = (
    *("config", "errors", "jsonb", "mem0_models", "records", "connection", "writer"),
    *("database", "services", "deps", "exception_handlers", "routers", "cc_main"),
)
"""The rooms of `backend.cc`: each may use those above it and `common`. A module of your own may use all of them."""


def imported(path: Path) -> Iterator[str]:
    """Yield the name of each module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_a_room_uses_only_the_rooms_above_it() -> None:
    for number, room in enumerate(ROOMS):
        place = ROOT / "src/backend/cc" / room
        files = list(place.glob("*.py")) or [place.with_suffix(".py")]
        for name in (name for file in files for name in imported(file)):
            assert not name.startswith(tuple(f"backend.cc.{below}" for below in ROOMS[number + 1 :])), room


def test_common_knows_nothing_of_cc() -> None:
    for path in (ROOT / "src/common").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("backend")], path
        assert "mem0_cc" not in path.read_text()


def test_the_migrations_know_no_service_and_no_web_framework() -> None:
    service = tuple(f"backend.cc.{room}" for room in ROOMS[ROOMS.index("services") :])
    names = set(imported(ROOT / "migrations/env.py"))
    assert not {name for name in names if name.startswith((*service, "fastapi", "starlette", "common"))}
