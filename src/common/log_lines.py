"""Log lines with a level, and with the request they belong to."""

import logging

from opentelemetry import trace
from uvicorn.logging import DefaultFormatter

from common.request_id_middleware import NOTE, request_id_var


class RequestIDFilter(logging.Filter):
    """Add `request_id` and `trace_id`, or None, to the log records of a handler; a record's own ids stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        # An exception is logged when its request is over. The middleware has noted the id on it.
        notes = getattr(record.exc_info[1], "__notes__", ()) if record.exc_info else ()
        noted = (note.removeprefix(NOTE) for note in notes if note.startswith(NOTE))
        record.__dict__.setdefault("request_id", request_id_var.get() or next(noted, None))
        context = trace.get_current_span().get_span_context()
        trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else None
        record.__dict__.setdefault("trace_id", trace_id)
        return True


class RequestFormatter(DefaultFormatter):
    """Uvicorn's style, `LEVEL:    message [request id]`. No text in it can look like another line."""

    def format(self, record: logging.LogRecord) -> str:
        line, *traceback = super().format(record).splitlines()
        return "\n    ".join([line, *map(printable, traceback)])

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in `logging`
        request_id = getattr(record, "request_id", None)
        record.message = printable(f"{record.message} [{request_id}]" if request_id else record.message)
        return super().formatMessage(record)


def printable(text: str) -> str:
    r"""Return `text` with an escape, e.g. `\n` or `\x1b`, in place of what ends or changes a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def configure_logging(*names: str) -> None:
    """Print warnings, and what the loggers `names` say from INFO up, unless the root logger is configured already."""
    logging.getLogger("uvicorn.error").addFilter(_drop_query)
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.addFilter(RequestIDFilter())
        handler.setFormatter(RequestFormatter("%(levelprefix)s %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        for name in names:
            logging.getLogger(name).setLevel(logging.INFO)


def _drop_query(record: logging.LogRecord) -> bool:
    # uvicorn prints the whole address of a WebSocket, and callers leave tokens in query strings.
    if "WebSocket" in str(record.msg) and isinstance(record.args, tuple):
        record.args = tuple(arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args)
    return True
