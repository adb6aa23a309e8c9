"""Whatever is sent: never a 5xx; what is accepted is stored exactly, what is refused leaves nothing."""

import gzip
import json
import re
import time
from decimal import Decimal
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from support.abuse import JSON, Abused

DEPTH_MAX = 128
"""Levels of nesting that are kept, as `to_jsonb` promises."""

REPLACEMENT = "\ufffd"

MAX_BODY = 1_048_576
"""The default of CC_MAX_BODY_BYTES."""


def clean(text: str) -> str:
    """Return what `to_jsonb` promises for text, said in another way."""
    return "".join(REPLACEMENT if char == "\0" or "\ud800" <= char <= "\udfff" else char for char in text)


def as_stored(value: Any, depth: int = DEPTH_MAX) -> Any:
    """Return what `to_jsonb` promises for JSON, said in another way."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return None if value != value or abs(value) == float("inf") else Decimal(repr(value))  # noqa: PLR0124
    if isinstance(value, dict | list) and depth == 0:
        return "[nested too deeply]"
    if isinstance(value, dict):
        stored: dict[str, Any] = {}
        for key, item in value.items():
            name = clean(key)
            while name in stored:
                name += f"{REPLACEMENT}{len(stored)}"
            stored[name] = as_stored(item, depth - 1)
        return stored
    if isinstance(value, list):
        return [as_stored(item, depth - 1) for item in value]
    return value


def assert_stored(abused: Abused, answer: Any, body: dict[str, Any]) -> None:
    """Check that the two records hold what was sent."""
    body = dict(body)
    assert abused.prompt(answer) == {
        "role": clean(body.pop("role", "user")),
        "content": clean(body.pop("content", "")),
        "tokens_in": body.pop("tokens_in", 0),
        "tokens_out": body.pop("tokens_out", 0),
    }
    event_type, payload = clean(body.pop("event_type", "test_log")), body.pop("payload", {})
    assert abused.event(answer) == (event_type, as_stored({**payload, **body}))


def assert_stored_or_refused(abused: Abused, answer: Any, before: int, body: Any) -> None:
    """Check that an answer is one of two, and the database agrees."""
    assert str(answer.status) in abused.documented
    assert answer.status in (200, 400, 413, 422)
    assert len(answer.headers.get_all("x-request-id", [])) == 1
    assert abused.records() - before == (4 if answer.status == 200 else 0)
    if answer.status == 200:
        assert_stored(abused, answer, body)


# --- any JSON, and bytes that are none

# Any character, and often one of those that can't be stored.
text = st.text(st.characters(codec=None, exclude_categories=()), max_size=20) | st.text("\0\ud800a", max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=20
)
known = st.fixed_dictionaries(
    {},
    optional={
        "role": text.filter(bool),
        "content": text,
        "tokens_in": st.integers(0, 2**31 - 1),
        "tokens_out": st.integers(0, 2**31 - 1),
        "event_type": text.filter(bool),
        "payload": st.dictionaries(text, documents, max_size=4),
    },
)
wrong = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["role", "content", "tokens_in", "tokens_out", "event_type", "payload"], documents)
)
objects = st.builds(lambda more, body: {**more, **body}, st.dictionaries(text, documents, max_size=3), known | wrong)


@given(value=objects | documents, escaped=st.booleans())
@example(value={"role": "\0", "content": "\ud800", "event_type": "\0"}, escaped=True)
@example(value={"tokens_in": -1}, escaped=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_stored_exactly_or_refused_and_leaves_nothing(abused: Abused, *, value: Any, escaped: bool) -> None:
    before = abused.records()
    body = json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")
    assert_stored_or_refused(abused, abused.send(body, JSON), before, value)


cut_off = st.builds(lambda value, cut: json.dumps(value).encode()[:-cut], objects, st.integers(1, 9))


@given(body=st.binary(max_size=200) | cut_off)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_stored_exactly_or_refused_and_leave_nothing(abused: Abused, body: bytes) -> None:
    before = abused.records()
    answer = abused.send(body, JSON)
    assert_stored_or_refused(abused, answer, before, json.loads(body) if answer.status == 200 else None)


header_value = st.binary(max_size=200).map(lambda value: re.sub(rb"[\x00-\x08\x0a-\x1f\x7f]", b"", value).strip())
header_name = st.sampled_from(
    [
        b"X-Request-ID",
        b"baggage",
        b"traceparent",
        b"tracestate",
        b"Content-Type",
        b"Accept",
        b"Cookie",
        b"Authorization",
    ]
)
meaningful = st.sampled_from([b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"request_id=EVIL", b"application/json"])
header = st.tuples(header_name, header_value | meaningful)


@given(headers=st.lists(header, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_headers_harm_a_request(abused: Abused, headers: list[tuple[bytes, bytes]]) -> None:
    before = abused.records()
    answer = abused.send(b"{}", JSON, *headers)
    assert_stored_or_refused(abused, answer, before, {})
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", answer.headers["x-request-id"])


def repeats_a_key(body: dict[str, Any]) -> bool:
    """Tell of the one rule that a schema can't express."""
    payload = body.get("payload")
    return isinstance(payload, dict) and bool(payload.keys() & body.keys())


def test_every_answer_to_generated_requests_is_as_documented(abused: Abused) -> None:
    schema = schemathesis.openapi.from_url(f"{abused.service.url}/openapi.json")
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]

        @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]))
        @settings(max_examples=60, deadline=None)
        def validate(case: Any) -> None:
            assume(not (isinstance(case.body, dict) and repeats_a_key(case.body)))
            case.call_and_validate()

        validate()


# --- the known-hard cases, one by one

DEEP = 100_000
HUGE = b"9" * 200_000


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        pytest.param(rb'{"k": "a\u0000b"}', {"k": "a\ufffdb"}, id="NUL in a value"),
        pytest.param(rb'{"a\u0000b": 1}', {"a\ufffdb": 1}, id="NUL in a key"),
        pytest.param(rb'{"k": "\ud800"}', {"k": "\ufffd"}, id="lone high surrogate"),
        pytest.param(rb'{"k": "\udc00\ud800"}', {"k": "\ufffd\ufffd"}, id="surrogates the wrong way round"),
        pytest.param(b'{"k": "\xed\xa0\x80"}', {"k": "\ufffd"}, id="lone surrogate, not escaped"),
        pytest.param(rb'{"\ud800": 1}', {"\ufffd": 1}, id="lone surrogate in a key"),
        pytest.param(rb'{"k": "\ud83d\ude00"}', {"k": "\U0001f600"}, id="a pair of surrogates is a character"),
        pytest.param(rb'{"k": "a\\u0000b"}', {"k": "a\\u0000b"}, id="a backslash and u0000, spelled out"),
        pytest.param(b'{"k": NaN}', {"k": None}, id="NaN"),
        pytest.param(b'{"k": [Infinity, -Infinity]}', {"k": [None, None]}, id="infinities"),
        pytest.param(b'{"k": 1e400}', {"k": None}, id="1e400"),
        pytest.param(b'{"k": 1e308}', {"k": 10**308}, id="1e308"),
        pytest.param(b'{"k": 5e-324}', {"k": Decimal("5e-324")}, id="5e-324"),
        pytest.param(b'{"k": 2147483648}', {"k": 2147483648}, id="an integer past int4"),
        pytest.param(b'{"k": 9223372036854775808}', {"k": 9223372036854775808}, id="an integer past int8"),
        pytest.param(b'{"k": ' + b"9" * 4300 + b"}", {"k": 10**4300 - 1}, id="an integer of 4,300 digits"),
        pytest.param(
            rb'{"k": ' + b"9" * 4300 + rb', "l": "\u0000"}',
            {"k": 10**4300 - 1, "l": "\ufffd"},
            id="an integer of 4,300 digits beside a NUL",
        ),
        pytest.param(b'{"k": 1, "k": 2}', {"k": 2}, id="duplicate keys: the last one, as everywhere in Python"),
        pytest.param(b'{"k": ' + b"[" * 127 + b"]" * 127 + b"}", None, id="128 levels"),
        pytest.param(b'{"k": ' + b"[" * 128 + b"]" * 128 + b"}", None, id="129 levels"),
        pytest.param(b'{"k": ' + b"[" * 500 + b"]" * 500 + b"}", None, id="501 levels"),
        pytest.param(b'{"": ""}', {"": ""}, id="empty key"),
        pytest.param(b'{"tokens_in": 1.0}', {}, id="one token, written as JSON may"),
        pytest.param(b'\xef\xbb\xbf{"k": 1}', {"k": 1}, id="byte order mark"),
        pytest.param('{"k": "\u65e5"}'.encode("utf-16"), {"k": "\u65e5"}, id="UTF-16"),
        pytest.param(b'{"__proto__": {"$ref": "#"}}', {"__proto__": {"$ref": "#"}}, id="other languages' keys"),
    ],
)
def test_a_hard_case_is_stored(abused: Abused, body: bytes, stored: Any) -> None:
    answer = abused.send(body, JSON)
    assert answer.status == 200, answer.body
    assert abused.event(answer) == ("test_log", stored if stored is not None else as_stored(json.loads(body)))


@pytest.mark.parametrize("field", ["role", "content", "event_type"])
@pytest.mark.parametrize("value", ["\0", "\ud800", "a\0b\udfff", "'; DROP TABLE mem0_cc.base_log; --", "%s $1 :x"])
def test_hard_text_is_stored(abused: Abused, field: str, value: str) -> None:
    body = {field: value}
    answer = abused.send(json.dumps(body).encode(), JSON)
    assert answer.status == 200, answer.body
    assert_stored(abused, answer, body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({f"key {i}": i for i in range(20_000)}, id="20,000 keys"),
        pytest.param(list(range(150_000)), id="150,000 items"),
        pytest.param([[]] * 200_000, id="200,000 lists"),
        pytest.param("x" * 1_000_000, id="a megabyte of text"),
        pytest.param("\0" * 170_000, id="170,000 NULs"),
    ],
)
def test_a_large_body_is_stored_and_soon(abused: Abused, body: Any) -> None:
    value = {"payload": {"k": body}}
    started = time.monotonic()
    answer = abused.send(json.dumps(value, separators=(",", ":")).encode(), JSON)
    assert time.monotonic() - started < 5
    assert answer.status == 200, answer.body[:200]
    assert_stored(abused, answer, value)


def test_20000_keys_that_become_one_are_all_kept_and_soon(abused: Abused) -> None:
    """Each key is two lone surrogates, so all keys are stored as the same two replacement characters."""
    keys = [rf'"\udc{i // 250:02x}\udc{i % 250:02x}":{i}' for i in range(20_000)]
    started = time.monotonic()
    answer = abused.send(('{"payload": {' + ",".join(keys) + "}}").encode(), JSON)
    assert time.monotonic() - started < 5
    assert answer.status == 200
    _, payload = abused.event(answer)
    assert sorted(payload.values()) == list(range(20_000))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="an array"),
        pytest.param(b'"{}"', id="a string"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"{}{}", id="two of them"),
        pytest.param(b"{'k': 1}", id="Python"),
        pytest.param(b'{"k": "\0"}', id="NUL, not escaped"),
        pytest.param(b'{"tokens_in": -1}', id="negative tokens"),
        pytest.param(b'{"tokens_in": 2147483648}', id="tokens past int4"),
        pytest.param(b'{"tokens_in": true}', id="true tokens"),
        pytest.param(b'{"tokens_in": "1"}', id="a string of tokens"),
        pytest.param(b'{"tokens_in": 1.5}', id="half a token"),
        pytest.param(b'{"tokens_out": NaN}', id="NaN tokens"),
        pytest.param(b'{"tokens_out": null}', id="no tokens"),
        pytest.param(b'{"role": ""}', id="empty role"),
        pytest.param(b'{"role": "' + b"x" * 256 + b'"}', id="long role"),
        pytest.param(b'{"event_type": ""}', id="empty event type"),
        pytest.param(b'{"event_type": {"a": 1}}', id="an object for an event type"),
        pytest.param(b'{"content": 1}', id="a number for content"),
        pytest.param(b'{"payload": [1]}', id="an array for a payload"),
        pytest.param(b'{"payload": null}', id="null for a payload"),
        pytest.param(b'{"k": 1, "payload": {"k": 2}}', id="the same key beside the payload and in it"),
    ],
)
def test_a_bad_body_is_a_422_and_leaves_nothing(abused: Abused, body: bytes) -> None:
    before = abused.records()
    answer = abused.send(body, JSON)
    assert answer.status == 422
    assert answer.headers["x-request-id"] == answer.request_id
    assert abused.records() == before


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"k": "\xe2\x82"}', id="truncated UTF-8"),
        pytest.param(b'{"k": "\xff"}', id="not UTF-8"),
        pytest.param(b'{"k": ' + HUGE + b"}", id="an integer of 200,000 digits"),
        pytest.param(b'{"k": -' + HUGE + b"}", id="a negative one"),
        pytest.param(b'{"tokens_in": ' + HUGE + b"}", id="as many tokens"),
        pytest.param(b'{"k": ' + b"[" * DEEP + b"]" * DEEP + b"}", id="100,000 arrays in each other"),
        pytest.param(b'{"k":' * DEEP + b"1" + b"}" * DEEP, id="100,000 objects in each other"),
        pytest.param(b"[" * DEEP, id="100,000 opening brackets"),
        pytest.param(gzip.compress(b"{}"), id="compressed"),
    ],
)
def test_a_body_that_cannot_be_read_as_json_is_a_400_and_leaves_nothing(abused: Abused, body: bytes) -> None:
    before = abused.records()
    answer = abused.send(body, JSON)
    assert answer.status == 400
    assert answer.headers["x-request-id"] == answer.request_id
    assert abused.records() == before


@pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "in chunks"])
@pytest.mark.parametrize("size", [MAX_BODY + 1, 16 * 2**20])
def test_a_body_over_the_limit_is_refused_and_leaves_nothing(abused: Abused, size: int, *, chunked: bool) -> None:
    before = abused.records()
    answer = abused.send(b'{"k": "' + b"x" * (size - 9) + b'"}', JSON, chunked=chunked)
    assert answer.status == 413
    assert answer.headers["x-request-id"] == answer.request_id
    assert abused.records() == before


@pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "in chunks"])
def test_a_body_at_the_limit_is_stored(abused: Abused, *, chunked: bool) -> None:
    assert abused.send(b'{"k": "' + b"x" * (MAX_BODY - 9) + b'"}', JSON, chunked=chunked).status == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (b"application/json; charset=utf-8", 200),
        (b"APPLICATION/JSON", 200),
        (b"text/plain", 422),
        (b"application/x-www-form-urlencoded", 422),
        (b"multipart/form-data; boundary=x", 422),
        (b"application/jsonx", 422),
        (b"\xff\xfe", 422),
        (b"", 422),
        (None, 422),
    ],
)
def test_a_body_counts_as_json_only_where_it_says_so(abused: Abused, content_type: bytes | None, status: int) -> None:
    """A browser asks before it sends JSON to another origin; other media types it sends without asking."""
    before = abused.records()
    headers = [] if content_type is None else [(b"Content-Type", content_type)]
    assert abused.send(b"{}", *headers).status == status
    assert abused.records() - before == (4 if status == 200 else 0)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([b""], id="empty"),
        pytest.param([b"a" * 129], id="129 characters"),
        pytest.param([b"a" * 60_000], id="60,000 characters"),
        pytest.param([b"one", b"two"], id="two"),
        pytest.param([b"same", b"same"], id="twice the same"),
        pytest.param([b"one, two"], id="a list"),
        pytest.param([b"a b"], id="a space"),
        pytest.param([b"caf\xc3\xa9"], id="UTF-8"),
        pytest.param([b"\xff\xfe"], id="no text at all"),
        pytest.param([b"../../etc/passwd"], id="a path"),
        pytest.param([b"<script>"], id="markup"),
        pytest.param([b"${jndi:ldap://x}"], id="an expression"),
        pytest.param([b"'; DROP TABLE mem0_cc.base_log; --"], id="SQL"),
    ],
)
def test_a_hostile_request_id_is_replaced(abused: Abused, values: list[bytes]) -> None:
    answer = abused.send(b"{}", JSON, *((b"X-Request-ID", value) for value in values))
    assert answer.status == 200
    [request_id] = answer.headers.get_all("x-request-id", [])
    assert re.fullmatch(r"[0-9a-f-]{36}", request_id)
    assert {row["request_id"] for row in base_rows(abused, answer)} == {request_id}


def base_rows(abused: Abused, answer: Any) -> list[Any]:
    body = answer.json()
    return abused.fetch(
        "SELECT request_id, trace_id FROM mem0_cc.base_log WHERE id = any($1::uuid[])",
        [body["prompt_trace_id"], body["event_log_id"]],
    )


TRACE_ID = b"0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([(b"traceparent", b"00-" + TRACE_ID + b"-b7ad6b7169203331-01")], id="traceparent"),
        pytest.param([(b"traceparent", b"00-" + TRACE_ID + b"-b7ad6b7169203331-01")] * 2, id="two traceparents"),
        pytest.param([(b"traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00")], id="traceparent of zeros"),
        pytest.param([(b"traceparent", b"\xff" * 1000)], id="traceparent of bytes"),
        pytest.param([(b"traceparent", b"\\x\xff")], id="traceparent of a broken escape"),
        pytest.param([(b"User-Agent", b"\\N\xff")], id="User-Agent of a broken escape"),
        pytest.param([(b"tracestate", b"a=1," * 5000)], id="20 kB of tracestate"),
        pytest.param([(b"baggage", b"request_id=EVIL,mem0.record_id=EVIL,layer=EVIL")], id="baggage"),
        pytest.param([(b"baggage", b",".join(b"k%d=v" % i for i in range(2000)))], id="2,000 entries of baggage"),
        pytest.param([(b"X-B3-TraceId", TRACE_ID), (b"uber-trace-id", TRACE_ID)], id="other vendors' headers"),
        pytest.param([(b"X-%d" % i, b"x") for i in range(1000)], id="1,000 headers"),
        pytest.param([(b"X", b"x" * 60_000)], id="a header of 60 kB"),
    ],
)
def test_hostile_headers_change_nothing(abused: Abused, headers: list[tuple[bytes, bytes]]) -> None:
    answer = abused.send(b"{}", JSON, *headers)
    assert answer.status == 200
    for row in base_rows(abused, answer):
        assert row["request_id"] == answer.request_id
        assert re.fullmatch(r"[0-9a-f]{32}", row["trace_id"])
        assert row["trace_id"] not in (TRACE_ID.decode(), "0" * 32)


HEAD = b"POST /test-log HTTP/1.1\r\nHost: cc\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"GARBAGE\r\n\r\n", id="no HTTP"),
        pytest.param(HEAD + b"Content-Length: -1\r\n\r\n", id="negative length"),
        pytest.param(HEAD + b"X: \x00\r\n\r\n", id="NUL in a header"),
        pytest.param(
            b"POST /test-log HTTP/1.1\r\nHost: cc\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
            id="two lengths",
        ),
        pytest.param(
            HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="a length and chunks"
        ),
        pytest.param(
            b"POST /test-log HTTP/1.1\r\nHost: cc\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
            id="a broken chunk",
        ),
    ],
)
def test_what_is_not_http_is_a_400_and_leaves_nothing(abused: Abused, request_bytes: bytes) -> None:
    """uvicorn answers these before the application sees them, so they have no request id."""
    before = abused.records()
    assert abused.send_raw(request_bytes).status == 400
    assert abused.records() == before
