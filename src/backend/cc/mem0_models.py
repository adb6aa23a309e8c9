"""The three tables of L1 memory, in schema `mem0_cc`."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA: Final = "mem0_cc"
NAME_LENGTH: Final = 255  # characters of a role, an event type, a request id


class Base(DeclarativeBase):
    """Declarative base: everything in `mem0_cc`, every constraint named."""

    metadata = MetaData(
        schema=SCHEMA,
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        },
    )


class BaseLog(Base):
    """What every record has. Its id is the key of all three tables, so that they can be distributed by it."""

    __tablename__ = "base_log"
    __table_args__ = (Index(None, "request_id"), Index(None, "trace_id"), Index(None, "timestamp"))

    # A UUIDv7 that the service makes. It is ordered by time, so that inserts stay at the right edge of the index.
    id: Mapped[UUID] = mapped_column(primary_key=True)
    timestamp: Mapped[datetime] = mapped_column(DateTime(timezone=True))  # of the call, by the service's clock
    source_module: Mapped[str] = mapped_column(String(NAME_LENGTH))  # "cc"
    request_id: Mapped[str] = mapped_column(String(NAME_LENGTH))  # also in the response's X-Request-ID and on spans
    trace_id: Mapped[str] = mapped_column(String(32))  # hexadecimal (W3C Trace Context)


class PromptTrace(Base):
    """One message of a conversation with a model."""

    __tablename__ = "prompt_trace"
    __table_args__ = (
        CheckConstraint("tokens_in >= 0", name="tokens_in_not_negative"),
        CheckConstraint("tokens_out >= 0", name="tokens_out_not_negative"),
    )

    base_log_id: Mapped[UUID] = mapped_column(ForeignKey(BaseLog.id, ondelete="CASCADE"), primary_key=True)
    role: Mapped[str] = mapped_column(String(NAME_LENGTH))
    content: Mapped[str] = mapped_column(Text)
    tokens_in: Mapped[int] = mapped_column(Integer)
    tokens_out: Mapped[int] = mapped_column(Integer)


class EventLog(Base):
    """One event of the system."""

    __tablename__ = "event_log"

    base_log_id: Mapped[UUID] = mapped_column(ForeignKey(BaseLog.id, ondelete="CASCADE"), primary_key=True)
    event_type: Mapped[str] = mapped_column(String(NAME_LENGTH))
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
