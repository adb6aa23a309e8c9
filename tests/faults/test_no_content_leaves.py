"""What users write, and what opens the database, is in no span, log line, error answer or exception's text."""

import tempfile
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url

from devtools.otlp import Receiver, otlp_receiver
from devtools.waiting import until
from support.cluster import Postgres, Run, fetch, post, request

PROMPT, PAYLOAD, PASSWORD, ADDRESS, TOKEN, QUERY, HEADER = SENTINELS = [
    f"sentinel-{name}" for name in ("prompt", "payload", "password", "address", "token", "query", "header")
]

HEADERS = {
    "Authorization": HEADER,
    "Cookie": HEADER,
    "Referer": HEADER,
    "X-Api-Key": HEADER,
    "X-Request-ID": f"not an id {HEADER}",
    "baggage": HEADER,
    "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",  # else nobody looks at the next one
    "tracestate": HEADER,
}

BODY = {"content": PROMPT, "payload": {"k": PAYLOAD}, PAYLOAD: PAYLOAD}

RAISE_ROW = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'refused: %', NEW USING DETAIL = NEW::text, HINT = NEW::text; END $$;
CREATE {kind} TRIGGER refuse AFTER INSERT ON mem0_cc.prompt_trace {deferred} FOR EACH ROW EXECUTE FUNCTION refuse();
CREATE {kind} TRIGGER refuse AFTER INSERT ON mem0_cc.event_log {deferred} FOR EACH ROW EXECUTE FUNCTION refuse()"""
AT_ONCE = RAISE_ROW.replace("{kind}", "").replace("{deferred}", "")
AT_COMMIT = RAISE_ROW.replace("{kind}", "CONSTRAINT").replace("{deferred}", "DEFERRABLE INITIALLY DEFERRED")
FULL = [fault.replace("USING", "USING ERRCODE = '53100',") for fault in (AT_ONCE, AT_COMMIT)]
MISSING = "ALTER TABLE mem0_cc.base_log RENAME TO elsewhere"
PATHS = ("/test-log", "/joined")
UNDO = """
DROP FUNCTION IF EXISTS refuse CASCADE; ALTER TABLE IF EXISTS mem0_cc.elsewhere RENAME TO base_log;"""


def found(text: str) -> list[str]:
    return [sentinel for sentinel in SENTINELS if sentinel in text]


def exported(receiver: Receiver) -> str:
    """Return all that has arrived. Protobuf writes text as it is."""
    return b"".join(receiver._bodies).decode(errors="replace")


@pytest.fixture
def secret_url(postgres: Postgres, database_url: str) -> Iterator[str]:
    """The database by an address and a role that have sentinels for a directory and a password."""
    url = make_url(database_url)
    fetch(postgres.url, f"CREATE ROLE secret SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
    with tempfile.TemporaryDirectory(prefix=ADDRESS) as directory:
        socket = Path(directory) / "socket"
        socket.symlink_to(str(url.query["host"]))
        url = url.set(username="secret", password=PASSWORD, query={**url.query, "host": str(socket)})
        yield url.render_as_string(hide_password=False)
    postgres.heal()
    fetch(postgres.url, "DROP ROLE secret")


def test_no_sentinel_leaves_on_any_path(postgres: Postgres, run: Run, database_url: str, secret_url: str) -> None:
    """Every endpoint is called, and every kind of refusal and failure happens."""
    answers: list[httpx.Response] = []

    with (
        otlp_receiver() as otlp,
        otlp_receiver() as logfire,
        run(
            *("--app-dir=tests",),
            app="support.endpoints:app",
            DATABASE_URL=secret_url,
            LOGFIRE_TOKEN=TOKEN,
            LOGFIRE_BASE_URL=logfire.endpoint,
            OTEL_EXPORTER_OTLP_ENDPOINT=otlp.endpoint,
        ) as service,
    ):

        def send(path: str, status: int, method: str = "POST", **options: object) -> None:
            content = options or {"json": BODY}
            answer = request(method, f"{service.url}{path}?q={QUERY}", headers=HEADERS, **content)
            assert answer.status_code == status, (path, answer.text)
            answers.append(answer)

        def send_all(status: int, paths: Sequence[str] = PATHS) -> None:
            for path in paths:
                send(path, status)

        send_all(HTTPStatus.OK)
        for wrong in ({"role": ""}, {"role": PROMPT * 100}, {"payload": {PAYLOAD: 1}}, {"payload": PAYLOAD}):
            send("/test-log", 422, json={**BODY, **wrong})
        for body in ({"content": {PROMPT: PROMPT}}, {"tokens_in": PROMPT}, [PROMPT]):
            send("/test-log", 422, json=body)
            send("/joined", 422, json=body)
        send("/test-log", 422, content=PROMPT)
        send("/joined", 422, content=PROMPT)
        send("/test-log", 413, content=PROMPT * 100_000)
        send("/test-log", 405, "PUT")
        send("/nowhere", 404)

        for fault, paths in ((AT_ONCE, PATHS), (MISSING, PATHS), (AT_COMMIT, PATHS[:1])):
            fetch(database_url, fault)
            send_all(500, paths)
            fetch(database_url, UNDO)
        for fault in FULL:
            fetch(database_url, fault)
            send_all(503)
            fetch(database_url, UNDO)
        postgres.freeze()
        send_all(503)
        postgres.thaw()
        postgres.stop()
        send_all(503)
        send("/query", 503)
        postgres.start()
        send_all(HTTPStatus.OK)
        log = service.log

        # The server prints an endpoint's own exception, its text included: that log is not ours to change. A commit
        # that fails is such an exception, too.
        fetch(database_url, AT_COMMIT)
        send("/joined", 500)
        fetch(database_url, UNDO)
        send("/refused-query", 500)
        send("/crash", 500)
        send("/crash-in-transaction", 500)
        send("/crash-in-validation", 500)
        service.stop()

    for receiver in (otlp, logfire):
        spans = receiver.spans
        assert {"log_l1 prompt_trace", "POST /test-log", "POST /joined"} <= {span.name for span in spans}
        assert any(event.name == "exception" for span in spans for event in span.proto.events)
        assert found(exported(receiver)) == []
    for answer in answers:
        assert found(answer.text + str(answer.headers)) == []
    assert found(log) == []


@pytest.mark.parametrize("status", [401, 500])
def test_no_sentinel_is_logged_where_spans_are_refused(run: Run, secret_url: str, status: int) -> None:
    """The OpenTelemetry SDK logs that an export was refused; this line must not contain the token."""
    with (
        otlp_receiver(status=status) as receiver,
        run(
            DATABASE_URL=secret_url,
            LOGFIRE_TOKEN=TOKEN,
            LOGFIRE_BASE_URL=receiver.endpoint,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        ) as service,
    ):
        assert post(f"{service.url}/test-log", json=BODY, headers=HEADERS).status_code == HTTPStatus.OK
        until(lambda: receiver.requests > 0)
        service.stop()
        assert found(service.log) == []
