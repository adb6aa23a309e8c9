"""Log lines with a level, and with the request they belong to."""

import logging

from opentelemetry import trace
from uvicorn.logging import DefaultFormatter

from common.request_id_middleware import request_id_var


class RequestIDFilter(logging.Filter):
    """Give a log record its `request_id` and `trace_id`, None outside a request or a trace, unless it has its own.

    Put it on handlers: a logger's filter doesn't see the records of the loggers below it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request_id_var.get()
        if not hasattr(record, "trace_id"):
            context = trace.get_current_span().get_span_context()
            record.trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else None
        return True


class RequestFormatter(DefaultFormatter):
    """Uvicorn's style, `LEVEL:    message`, followed by the request id. No text in it can look like another line."""

    def format(self, record: logging.LogRecord) -> str:
        line, *traceback = super().format(record).splitlines()
        return "\n    ".join([line, *map(printable, traceback)])

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in `logging`
        request_id = getattr(record, "request_id", None)
        record.message = printable(f"{record.message} [{request_id}]" if request_id else record.message)
        return super().formatMessage(record)


def printable(text: str) -> str:
    r"""Return `text` with an escape, e.g. `\n` or `\x1b`, in place of what isn't printed but ends or changes a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def configure_logging(*names: str) -> None:
    """Print records from WARNING up, and those of the loggers `names` from INFO up: other libraries' may hold content.

    An application that has configured the root logger keeps its configuration.
    """
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.addFilter(RequestIDFilter())
        handler.setFormatter(RequestFormatter("%(levelprefix)s %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        for name in names:
            logging.getLogger(name).setLevel(logging.INFO)
