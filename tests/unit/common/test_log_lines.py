import logging
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import httpx
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from common.log_lines import RequestLogRecord
from common.request_id_middleware import request_id_var
from devtools import ROOT
from devtools.service import running_service

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"

SETUP = """
    import logging
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


def a_record() -> logging.LogRecord:
    return RequestLogRecord("name", logging.INFO, "path", 1, "message", (), None)


def test_a_line_has_its_level_and_inside_a_request_ends_with_the_id() -> None:
    lines = """
        configure_logging("ours")
        theirs.warning("outside")
        request_id_var.set("mine")
        theirs.warning("inside %s", 1)
        ours.error("failed")
    """
    assert printed_by(lines) == "WARNING:  outside\nWARNING:  inside 1 [mine]\nERROR:    failed [mine]\n"


def test_the_id_stands_behind_the_message_and_before_the_traceback() -> None:
    lines = """
        configure_logging()
        request_id_var.set("mine")
        try:
            raise KeyError("x")
        except KeyError:
            theirs.exception("failed")
    """
    first, *_, last = printed_by(lines).splitlines()
    assert (first, last) == ("ERROR:    failed [mine]", "KeyError: 'x'")


def test_information_is_printed_of_the_named_loggers_and_of_no_other() -> None:
    lines = """
        configure_logging("ours")
        ours.info("ours")
        ours.debug("detail")
        theirs.info("GET https://example.com/?token=secret")
    """
    assert printed_by(lines) == "INFO:     ours\n"


def test_configuring_twice_prints_a_line_once() -> None:
    lines = 'configure_logging("ours"); configure_logging("ours"); ours.info("ours")'
    assert printed_by(lines) == "INFO:     ours\n"


def test_an_application_that_has_configured_the_root_logger_keeps_handler_level_and_format() -> None:
    lines = """
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.ERROR)
        configure_logging("ours")
        ours.info("ours")
        theirs.warning("a warning")
        theirs.error("an error")
    """
    assert printed_by(lines) == "ERROR an error\n"


def test_an_applications_own_format_can_name_the_ids() -> None:
    lines = """
        logging.basicConfig(format="%(request_id)s %(trace_id)s %(message)s")
        configure_logging("ours")
        theirs.warning("outside")
        request_id_var.set("mine")
        theirs.warning("inside")
    """
    assert printed_by(lines) == "None None outside\nmine None inside\n"


def test_an_applications_own_record_factory_stays_and_its_records_are_printed_without_an_id() -> None:
    lines = """
        class Record(logging.LogRecord): pass
        logging.setLogRecordFactory(Record)
        configure_logging()
        assert logging.getLogRecordFactory() is Record
        request_id_var.set("mine")
        theirs.warning("message")
    """
    assert printed_by(lines) == "WARNING:  message\n"


def test_a_record_outside_any_request_and_trace_has_no_ids() -> None:
    record = a_record()
    assert (record.request_id, record.trace_id) == (None, None)  # type: ignore[attr-defined]


def test_a_record_inside_a_trace_has_the_traces_id() -> None:
    context = SpanContext(int(TRACE_ID, 16), 1, is_remote=False, trace_flags=TraceFlags(0))
    token = request_id_var.set("mine")
    with use_span(NonRecordingSpan(context)):
        record = a_record()
    request_id_var.reset(token)
    assert (record.request_id, record.trace_id) == ("mine", TRACE_ID)  # type: ignore[attr-defined]


def test_the_service_prints_one_warning_with_the_id_for_a_request_that_it_could_not_serve(tmp_path: Path) -> None:
    with running_service("postgresql://nobody@127.0.0.1:1/nothing", tmp_path / "log") as service:
        httpx.post(f"{service.url}/test-log", json={}, headers={"X-Request-ID": "mine"})
        [line] = [line for line in service.log.splitlines() if "SQLSTATE" in line]
    assert line.startswith("WARNING:  POST /test-log: 503, the database is unavailable (SQLSTATE 08001)")
    assert line.endswith(" [mine]")
