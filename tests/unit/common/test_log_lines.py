import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import httpx
import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from common.log_lines import RequestIDFilter, configure_logging
from common.request_id_middleware import request_id_var
from devtools import ROOT
from devtools.service import running_service

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"

SETUP = """
    import logging, logging.config
    from common.log_lines import configure_logging
    from common.request_id_middleware import request_id_var
    ours, theirs = logging.getLogger("ours.module"), logging.getLogger("theirs")
"""


def printed_by(*code: str) -> str:
    """Run code in a process of its own, because logging is configured once for a process."""
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(map(dedent, (SETUP, *code)))],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == ""
    return ran.stderr


def test_a_line_has_its_level_and_the_id_of_its_request_and_information_is_of_the_named_loggers_alone() -> None:
    lines = """
        configure_logging("ours")
        configure_logging("ours")
        theirs.info("GET https://example.com/?token=secret")
        ours.info("outside")
        ours.debug("detail")
        request_id_var.set("mine")
        theirs.warning("inside %s", 1)
        theirs.warning("of another", extra={"request_id": "another", "trace_id": 1})
        try:
            raise KeyError("x")
        except KeyError:
            ours.exception("failed")
    """
    before = "INFO:     outside\nWARNING:  inside 1 [mine]\nWARNING:  of another [another]\n"
    printed = printed_by(lines)
    assert printed.startswith(f"{before}ERROR:    failed [mine]\n    Traceback ")
    assert printed.endswith("\n    KeyError: 'x'\n")


def test_no_text_in_a_record_looks_like_another_line() -> None:
    lines = r"""
        configure_logging()
        theirs.warning("asked %s", "é 😀 \nERROR:    b\u2028\x1b[2J\x9b\u202e", extra={"request_id": "x\r"})
        try:
            raise ValueError("a\nERROR:    b\x1b[2J\rc")
        except ValueError:
            theirs.exception("failed")
    """
    first, second, *traceback = printed_by(lines).splitlines()
    assert (first, second) == (r"WARNING:  asked é 😀 \nERROR:    b\u2028\x1b[2J\x9b\u202e [x\r]", "ERROR:    failed")
    assert [line[:4].strip() for line in traceback] == [""] * len(traceback)
    assert traceback[-2:] == [r"    ERROR:    b\x1b[2J", "    c"]


def test_an_application_that_has_configured_the_root_logger_keeps_its_configuration() -> None:
    root = logging.getLogger()
    before = [*root.handlers], root.level
    assert before[0]
    configure_logging("ours")
    assert ([*root.handlers], root.level, logging.getLogger("ours").level) == (*before, logging.NOTSET)


def test_a_configuration_can_name_the_filter_and_format_json() -> None:
    lines = """
        logging.config.dictConfig({
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"ids": {"()": "common.log_lines.RequestIDFilter"}},
            "formatters": {
                "json": {
                    "()": "pythonjsonlogger.json.JsonFormatter",
                    "format": "%(levelname)s %(message)s %(request_id)s %(trace_id)s",
                },
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["ids"], "formatter": "json"}},
            "root": {"handlers": ["stderr"]},
        })
        configure_logging("ours")
        request_id_var.set("mine")
        theirs.warning("inside")
    """
    found = json.loads(printed_by(lines))
    assert found == {"levelname": "WARNING", "message": "inside", "request_id": "mine", "trace_id": None}


def ids_of(record: logging.LogRecord) -> tuple[object, object]:
    assert RequestIDFilter().filter(record)
    return vars(record)["request_id"], vars(record)["trace_id"]


def test_the_ids_are_filled_in_where_they_are_missing_and_never_overwritten() -> None:
    context = SpanContext(int(TRACE_ID, 16), 1, is_remote=False, trace_flags=TraceFlags(0))
    assert ids_of(logging.makeLogRecord({})) == (None, None)
    token = request_id_var.set("mine")
    with use_span(NonRecordingSpan(context)):
        assert ids_of(logging.makeLogRecord({})) == ("mine", TRACE_ID)
        assert ids_of(logging.makeLogRecord({"request_id": None, "trace_id": "x"})) == (None, "x")
    request_id_var.reset(token)
    error = ValueError()
    error.add_note("request id: mine")  # what the server logs when the request is over
    assert ids_of(logging.makeLogRecord({"exc_info": (ValueError, error, None)})) == ("mine", None)


def test_uvicorns_line_about_a_websocket_has_no_query_string(caplog: pytest.LogCaptureFixture) -> None:
    configure_logging()
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.warning('%s - "WebSocket %s" [accepted]', ("127.0.0.1", 1), "/chat?token=secret")
    uvicorn.warning("ASGI 'lifespan' protocol?")
    assert caplog.messages == ["""('127.0.0.1', 1) - "WebSocket /chat" [accepted]""", "ASGI 'lifespan' protocol?"]


def test_the_service_prints_one_line_with_the_id_for_a_request_that_it_could_not_serve(tmp_path: Path) -> None:
    with running_service("postgresql://nobody@127.0.0.1:1/nothing", tmp_path / "log") as service:
        httpx.post(f"{service.url}/test-log", json={}, headers={"X-Request-ID": "mine"})
        [line] = [line for line in service.log.splitlines() if "503," in line]
    assert line.startswith("WARNING:  POST /test-log: 503, the database is unavailable ")
    assert line.endswith(" [mine]")
