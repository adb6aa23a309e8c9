import json
import math
from array import array
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import BaseModel

from backend.cc.jsonb import DEPTH_MAX, to_jsonb


def written(payload: Mapping[Any, Any]) -> Any:
    return json.loads(to_jsonb(payload))


class Colour(Enum):
    RED = "red"


class Size(StrEnum):
    SMALL = "small"


class Level(IntEnum):
    LOW = 1


class Shout(str, Enum):  # noqa: UP042 - not the same: str() of it is not its value
    LOUD = "loud"


@dataclass
class Pair:
    data: bytes
    n: object


class Model(BaseModel):
    data: bytes
    n: int = 1


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__


class Array:
    """As NumPy's: its text is abbreviated."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __str__(self) -> str:
        return "[0 1 2 ... 1997 1998 1999]"

    def tolist(self) -> Any:
        return self.values if len(self.values) > 1 else self.values[0]


class Proxy:
    """As a mock: it has every attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError
        return self

    def __str__(self) -> str:
        return "a proxy"


class HostileMapping(UserDict[str, Any]):
    def items(self) -> Any:
        raise KeyError


UNSERIALIZABLE = "[unserializable HostileMapping]"


def nested(levels: int) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for _ in range(levels - 1):
        payload = {"a": payload}
    return payload


PAYLOADS: list[tuple[dict[Any, Any], Any]] = [
    ({"a": None, "b": True, "c": 1, "d": 1.5, "e": "é😀", "f": []}, None),
    ({"a": math.nan, "b": [math.inf, -math.inf]}, {"a": None, "b": [None, None]}),
    ({"a": 2**63, "b": -(10**4000)}, None),
    ({"a": 10**4300 - 1, "b": math.nan}, {"a": 10**4300 - 1, "b": None}),
    ({"a": 10**4300, -(10**4300): "key"}, {"a": hex(10**4300), hex(-(10**4300)): "key"}),
    ({"a": [{"b": 1 - 16**166_000}]}, {"a": [{"b": hex(1 - 16**166_000)}]}),
    ({"a": UUID(int=7)}, {"a": str(UUID(int=7))}),
    ({"a": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}, {"a": "2026-01-02T03:04:05Z"}),
    ({"a": date(2026, 1, 2), "b": timedelta(hours=1)}, {"a": "2026-01-02", "b": "PT1H"}),
    ({"a": Decimal("1.10")}, {"a": "1.10"}),
    ({"a": Colour.RED, "b": Size.SMALL}, {"a": "red", "b": "small"}),
    ({"a": Level.LOW, "b": math.nan}, {"a": 1, "b": None}),
    ({"a": {3}, "b": (1, 2), "c": PurePosixPath("/x")}, {"a": [3], "b": [1, 2], "c": "/x"}),
    ({"a": b"bytes", "b": b"\xff\0"}, {"a": "bytes", "b": "_wA="}),
    ({"a": Pair(b"bytes", Hostile())}, {"a": {"data": "bytes", "n": "[unserializable Hostile]"}}),
    ({"a": Pair(b"\xff", math.inf)}, {"a": {"data": "_w==", "n": None}}),
    ({"a": "NUL \0 alone"}, {"a": "NUL \ufffd alone"}),
    ({"a": [[]] * 70 + [{}] * 70, "b": (1, math.nan)}, {"a": [[]] * 70 + [{}] * 70, "b": [1, None]}),
    ({"a": Model(data=b"\xff")}, {"a": {"data": "_w==", "n": 1}}),
    ({"a": Shout.LOUD, Shout.LOUD: math.nan}, {"a": "loud", "loud": None}),
    ({"a": MappingProxyType({"b": 1})}, {"a": {"b": 1}}),
    ({"a": Hostile(), "b": [1, HostileMapping()]}, {"a": "[unserializable Hostile]", "b": [1, UNSERIALIZABLE]}),
    ({"a": ValueError("x")}, {"a": "x"}),
    ({"a": Array(*range(2000))}, {"a": list(range(2000))}),
    (
        {"a": Array(1, math.nan), "b": Array(Array(1, 2), Array(3, b"\xff"))},
        {"a": [1, None], "b": [[1, 2], [3, "_w=="]]},
    ),
    ({"a": Array(7), Array(8): "b", "c": {Array(9)}}, {"a": 7, "8": "b", "c": [9]}),
    ({"a": Pair(b"", Array(1, 2)), "b": array("d", [0.5])}, {"a": {"data": "", "n": [1, 2]}, "b": [0.5]}),
    ({"a": [Array()], "b": Proxy()}, {"a": ["[unserializable Array]"], "b": "a proxy"}),
    ({(1, 2): "a", UUID(int=7): "b"}, {"[1,2]": "a", str(UUID(int=7)): "b"}),
    ({2: "a", None: "b", True: "c", 1.5: "d"}, {"2": "a", "null": "b", "true": "c", "1.5": "d"}),
    ({2: math.nan, None: "b", True: "c", 1.5: "d"}, {"2": None, "null": "b", "true": "c", "1.5": "d"}),
    ({"\0": 1, "\ufffd": 2, "\ud800": 3}, {"\ufffd": 1, "\ufffd\ufffd1": 2, "\ufffd\ufffd2": 3}),  # noqa: F601 - they are three
    (
        {1: "a", "1": "b", "c": {None: 1, "null": 2}},
        {"1": "a", "1\ufffd1": "b", "c": {"null": 1, "null\ufffd1": 2}},
    ),
    ({"a": "\\u0000 is text", "b": "["}, {"a": "\\u0000 is text", "b": "["}),
    ({"a": "[" * 1000}, None),
    (nested(DEPTH_MAX), None),
    ({"a": json.loads("[" * 200 + "]" * 200)}, {"a": json.loads("[" * 127 + '"[nested too deeply]"' + "]" * 127)}),
    ({"1" * 10_000: "x" * 100_000}, None),
]


@pytest.mark.parametrize(("payload", "expected"), PAYLOADS)
def test_a_payload_is_written_whatever_is_in_it(payload: dict[Any, Any], expected: Any) -> None:
    assert written(payload) == (payload if expected is None else expected)


async def test_postgresql_takes_each_of_them_as_it_is_written(db: asyncpg.Connection) -> None:
    for payload, _ in PAYLOADS:
        assert json.loads(await db.fetchval("SELECT $1::text::jsonb", to_jsonb(payload))) == written(payload)


@pytest.mark.parametrize("levels", [DEPTH_MAX + 1, 100_000])
def test_what_is_nested_too_deeply_is_cut_off_where_it_is(levels: int) -> None:
    found = written(nested(levels))
    depth = 0
    while isinstance(found, dict):
        (found,) = found.values()
        depth += 1
    assert (depth, found) == (DEPTH_MAX, "[nested too deeply]")


def test_what_contains_itself_is_cut_off_where_it_begins_again() -> None:
    shared = {"n": 1}
    tree: dict[str, Any] = {"before": [shared, shared]}
    tree["children"] = [{"parent": tree}, {"parent": tree}]
    assert written(tree) == {
        "before": [{"n": 1}, {"n": 1}],
        "children": [{"parent": "[repeated]"}, {"parent": "[repeated]"}],
    }


def test_a_cyclic_graph_is_written_once_per_node() -> None:
    nodes: list[dict[str, Any]] = [{"n": n, UUID(int=n): math.nan} for n in range(100)]  # type: ignore[dict-item]
    for node in nodes:
        node["links"] = nodes
    text = to_jsonb(nodes[0])
    assert all(text.count(f'"n":{n},') + text.count(f'"n":{n}}}') == 1 for n in range(100))
