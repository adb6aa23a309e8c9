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

from backend.cc.jsonb import clean_text, to_jsonb
from support.abuse import JSON, Abused


def assert_stored(abused: Abused, answer: Any, body: dict[str, Any]) -> None:
    """Check that the two records hold what was sent, as `clean_text` and `to_jsonb` promise it."""
    body = dict(body)
    assert abused.prompt(answer) == {
        "role": clean_text(body.pop("role", "user")),
        "content": clean_text(body.pop("content", "")),
        "tokens_in": int(body.pop("tokens_in", 0)),
        "tokens_out": int(body.pop("tokens_out", 0)),
    }
    event_type, payload = clean_text(body.pop("event_type", "test_log")), body.pop("payload", {})
    stored = json.loads(to_jsonb({**payload, **body}), parse_float=Decimal)
    assert abused.event(answer) == (event_type, stored)


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
tokens = st.integers(0, 2**31 - 1)
payloads = st.dictionaries(text, documents, max_size=4)
FIELDS = {
    "role": text.filter(bool),
    "content": text,
    "tokens_in": tokens,
    "tokens_out": tokens,
    "event_type": text.filter(bool),
    "payload": payloads,
}
known = st.fixed_dictionaries({}, optional=FIELDS)
wrong = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, documents))
objects = st.builds(lambda more, body: {**more, **body}, payloads, known | wrong)
cut_off = st.builds(lambda value, cut: json.dumps(value).encode()[:-cut], objects, st.integers(1, 9))

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(value=objects | documents, escaped=st.booleans())
@example(value={"content": "\0", "k": "\ud800"}, escaped=True)
@example(value={"tokens_in": -1}, escaped=True)
@many
def test_any_json_is_stored_exactly_or_refused_and_leaves_nothing(abused: Abused, *, value: Any, escaped: bool) -> None:
    before = abused.records()
    body = json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")
    assert_stored_or_refused(abused, abused.send(body, JSON), before, value)


@given(body=st.binary(max_size=200) | cut_off)
@example(body=gzip.compress(b"{}"))
@many
def test_any_bytes_are_stored_exactly_or_refused_and_leave_nothing(abused: Abused, body: bytes) -> None:
    before = abused.records()
    answer = abused.send(body, JSON)
    assert_stored_or_refused(abused, answer, before, json.loads(body) if answer.status == 200 else None)


def test_every_answer_to_generated_requests_is_as_documented(abused: Abused) -> None:
    schema = schemathesis.openapi.from_url(f"{abused.service.url}/openapi.json")
    for result in schema.include(path="/test-log").get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]

        @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]))
        @settings(max_examples=60, deadline=None)
        def validate(case: Any) -> None:
            body = case.body if isinstance(case.body, dict) else {}
            # What the schema doesn't say: no key may be there twice, and pydantic takes true and "1" for 1.
            assume(not (isinstance(body.get("payload"), dict) and body["payload"].keys() & body.keys()))
            assume(not any(isinstance(body.get(name), bool | str) for name in ("tokens_in", "tokens_out")))
            case.call_and_validate()

        validate()


# --- the known-hard cases, one by one


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        pytest.param(b'{"k": "\xed\xa0\x80"}', {"k": "\ufffd"}, id="lone surrogate, not escaped"),
        pytest.param(rb'{"k": "\ud83d\ude00"}', {"k": "\U0001f600"}, id="a pair of surrogates is a character"),
        pytest.param(b'{"k": [NaN, Infinity, 1e400]}', {"k": [None] * 3}, id="what is no number"),
        pytest.param(b'{"k": [1e308, 5e-324]}', {"k": [10**308, Decimal("5e-324")]}, id="what just is one"),
        pytest.param(b'{"k": ' + b"9" * 4300 + b"}", {"k": 10**4300 - 1}, id="an integer of 4,300 digits"),
        pytest.param(b'{"k": 1, "k": 2}', {"k": 2}, id="duplicate keys: the last one, as everywhere in Python"),
        pytest.param(b'\xef\xbb\xbf{"k": 1}', {"k": 1}, id="byte order mark"),
        pytest.param('{"k": "\u65e5"}'.encode("utf-16"), {"k": "\u65e5"}, id="UTF-16"),
    ],
)
def test_a_hard_case_is_stored(abused: Abused, body: bytes, stored: Any) -> None:
    answer = abused.send(body, JSON)
    assert answer.status == 200, answer.body
    assert abused.event(answer) == ("test_log", stored)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({f"key {i}": i for i in range(20_000)}, id="20,000 keys"),
        pytest.param(dict.fromkeys((f"{chr(0xDC00 + i // 250)}{chr(0xDC00 + i % 250)}" for i in range(20_000)), 1)),
        pytest.param([[]] * 200_000, id="200,000 lists"),
        pytest.param(json.loads("[" * 500 + "]" * 500), id="500 levels"),
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


# --- headers

NAMES = re.findall(rb"\S+", b"X-Request-ID baggage traceparent tracestate Content-Type Accept Cookie User-Agent")
TRACE_ID = b"0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = (b"traceparent", b"00-" + TRACE_ID + b"-b7ad6b7169203331-01")

header_value = st.binary(max_size=200).map(lambda value: re.sub(rb"[\x00-\x08\x0a-\x1f\x7f]", b"", value).strip())
meaningful = st.sampled_from([TRACEPARENT[1], b"request_id=EVIL", b"application/json"])
header = st.tuples(st.sampled_from(NAMES), header_value | meaningful)


@given(headers=st.lists(header, max_size=12))
@example(headers=[TRACEPARENT])
@example(headers=[TRACEPARENT] * 2)
@example(headers=[(b"traceparent", b"\\x\xff"), (b"User-Agent", b"\\N\xff")])
@example(headers=[TRACEPARENT, (b"tracestate", b"a=1," * 5000)])
@example(headers=[(b"baggage", b"request_id=EVIL,mem0.record_id=EVIL,layer=EVIL")])
@example(headers=[(b"baggage", b",".join(b"k%d=v" % i for i in range(2000)))])
@example(headers=[(b"X-B3-TraceId", TRACE_ID), (b"uber-trace-id", TRACE_ID)])
@example(headers=[(b"X-%d" % i, b"x") for i in range(1000)])
@example(headers=[(b"X-Request-ID", b"a" * 60_000)])
@many
def test_no_headers_harm_a_request(abused: Abused, headers: list[tuple[bytes, bytes]]) -> None:
    before = abused.records()
    answer = abused.send(b"{}", JSON, *headers)
    assert_stored_or_refused(abused, answer, before, {})
    request_id = answer.headers["x-request-id"]
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id)
    if answer.status == 200:
        body = answer.json()
        for row in abused.fetch(
            "SELECT request_id, trace_id FROM mem0_cc.base_log WHERE id = any($1::uuid[])",
            [body["prompt_trace_id"], body["event_log_id"]],
        ):
            assert row["request_id"] == request_id
            assert re.fullmatch(r"(?!0{32})[0-9a-f]{32}", row["trace_id"])
            assert row["trace_id"] != TRACE_ID.decode()
