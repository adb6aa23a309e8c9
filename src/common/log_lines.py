"""Log lines with a level, and with the request they belong to."""

import logging

from opentelemetry import trace
from uvicorn.logging import DefaultFormatter

from common.request_id_middleware import request_id_var


class RequestLogRecord(logging.LogRecord):
    """A log record with `request_id` and `trace_id`; outside a request or a trace None."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        context = trace.get_current_span().get_span_context()
        self.request_id = request_id_var.get()
        self.trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else None


class RequestFormatter(DefaultFormatter):
    """Uvicorn's style, `LEVEL:    message`, with the request id behind the message where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in `logging`
        request_id = getattr(record, "request_id", None)
        return super().formatMessage(record) + (f" [{request_id}]" if request_id else "")


def configure_logging(*names: str) -> None:
    """Give every log record its ids. Print records from WARNING up, and those of the loggers `names` from INFO up.

    Other libraries' INFO may hold content. An application that has configured the root logger keeps its configuration,
    and can name the ids as `%(request_id)s` and `%(trace_id)s`. A record factory of its own stays.
    """
    if logging.getLogRecordFactory() is logging.LogRecord:
        logging.setLogRecordFactory(RequestLogRecord)
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RequestFormatter("%(levelprefix)s %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        for name in names:
            logging.getLogger(name).setLevel(logging.INFO)
