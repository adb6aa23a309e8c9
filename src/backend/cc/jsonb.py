"""Text and JSON that PostgreSQL can store, made of any text and any payload."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

DEPTH_MAX: Final = 128  # levels of nesting: fewer than Python and PostgreSQL allow in any configuration
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")
# `sort_keys` raises for keys of mixed types. That catches 1 and "1", which would become one name in JSON.
_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode


def clean_text(text: str) -> str:
    """Return `text` with U+FFFD in place of each character that PostgreSQL can't store: NUL and lone surrogates."""
    if text.isascii() and "\0" not in text:
        return text
    return _UNSTORABLE.sub("\ufffd", text)


def to_jsonb(payload: Mapping[str, Any]) -> str:
    r"""Return `payload` as JSON that PostgreSQL's `jsonb` takes. No value in it is an error.

    - NUL and lone surrogates become U+FFFD, in keys too.
    - Keys that become equal, as 1 and "1" do, get a number.
    - NaN and infinities become null. An integer that Python can't print (4,300 digits) becomes hexadecimal text.
    - A value that JSON can't express (UUID, datetime, Decimal, ...) becomes its usual text.
    - NumPy's arrays and scalars, and whatever else has `tolist()`, become the numbers that they hold.
    - Bytes that are not UTF-8 become base64 (RFC 4648, section 5).
    - A container inside itself becomes "[repeated]", and one below 128 levels of nesting "[nested too deeply]".
    - An object that can't be converted becomes "[unserializable <its class>]".
    """
    with contextlib.suppress(Exception):  # a value's own code may raise anything
        text = _dumps(payload)
        text.encode()  # raises for a lone surrogate
        # Most payloads need no more than this look. Text can't be nested deeper than the number of its brackets.
        if "\\u0000" not in text and text.count("[") + text.count("{") <= DEPTH_MAX:
            return text
    return _dumps(_clean(payload))


def _clean(value: Any, outer: tuple[Any, ...] = ()) -> Any:  # noqa: C901, PLR0911 - a branch for each kind of value
    """Return `value` made of what `jsonb` can store; `outer` are the containers that it is in."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(str.__str__(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        try:
            return int(int.__repr__(value))  # not `str`, which names the member of an IntEnum
        except ValueError:  # it has more digits than Python prints
            return hex(value)
    if len(outer) == DEPTH_MAX:
        return "[nested too deeply]"
    if any(value is container for container in outer):
        return "[repeated]"
    inner = (*outer, value)
    try:
        if isinstance(value, Mapping):
            return _clean_mapping(value, inner)
        if isinstance(value, list | tuple):
            return [_clean(item, inner) for item in value]
        return _clean(_usual_form(value), inner)
    except Exception:  # noqa: BLE001 - a foreign object's own code may raise anything; the rest is stored without it
        return f"[unserializable {type(value).__qualname__}]"


def _clean_mapping(value: Mapping[Any, Any], inner: tuple[Any, ...]) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    for key, item in value.items():
        clean_key = _clean(key, inner)
        name = clean_key if isinstance(clean_key, str) else _dumps(clean_key)
        while name in cleaned:  # JSON can't tell the two keys apart, and neither value may be lost
            name = f"{name}\ufffd{len(cleaned)}"
        cleaned[name] = _clean(item, inner)
    return cleaned


def _usual_form(value: Any) -> Any:
    try:
        return to_jsonable_python(value, fallback=_unknown_form)
    except ValueError:  # bytes that are not UTF-8; or a cycle, which raises again below
        if isinstance(value, BaseModel):  # its bytes follow a setting of the model
            return value.model_dump()
        return to_jsonable_python(value, bytes_mode="base64", fallback=_unknown_form)


def _unknown_form(value: Any) -> Any:
    """Return a list, a number or text for an object of a class that pydantic doesn't know."""
    with contextlib.suppress(Exception):
        return value.tolist() if hasattr(type(value), "tolist") else str(value)  # its class: a mock has every attribute
    return f"[unserializable {type(value).__qualname__}]"
