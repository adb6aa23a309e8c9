from datetime import UTC, datetime
from uuid import uuid4

import asyncpg
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.mem0_models import Base, BaseLog, EventLog, PromptTrace

COLUMNS = {
    "base_log": {
        "id": "uuid",
        "timestamp": "timestamp with time zone",
        "source_module": "character varying(255)",
        "request_id": "character varying(255)",
        "trace_id": "character varying(32)",
    },
    "prompt_trace": {
        "base_log_id": "uuid",
        "role": "character varying(255)",
        "content": "text",
        "tokens_in": "integer",
        "tokens_out": "integer",
    },
    "event_log": {"base_log_id": "uuid", "event_type": "character varying(255)", "payload": "jsonb"},
}

FOREIGN_KEY = "FOREIGN KEY (base_log_id) REFERENCES mem0_cc.base_log(id) ON DELETE CASCADE"
CONSTRAINTS = {
    ("base_log", "pk_base_log", "PRIMARY KEY (id)"),
    ("prompt_trace", "pk_prompt_trace", "PRIMARY KEY (base_log_id)"),
    ("prompt_trace", "fk_prompt_trace_base_log_id", FOREIGN_KEY),
    ("prompt_trace", "ck_prompt_trace_tokens_in_not_negative", "CHECK ((tokens_in >= 0))"),
    ("prompt_trace", "ck_prompt_trace_tokens_out_not_negative", "CHECK ((tokens_out >= 0))"),
    ("event_log", "pk_event_log", "PRIMARY KEY (base_log_id)"),
    ("event_log", "fk_event_log_base_log_id", FOREIGN_KEY),
}

CATALOGUE_COLUMNS = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'mem0_cc'::regnamespace AND c.relname = ANY($1) AND a.attnum > 0 ORDER BY 1, a.attnum
"""

CATALOGUE_CONSTRAINTS = """
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'mem0_cc'::regnamespace AND contype <> 'n'
"""


async def test_the_migrated_tables_have_exactly_these_columns_and_none_may_be_null(db: asyncpg.Connection) -> None:
    rows = await db.fetch(CATALOGUE_COLUMNS, COLUMNS.keys())
    found: dict[str, dict[str, str]] = {}
    for table, column, type_, not_null in rows:
        found.setdefault(table, {})[column] = type_
        assert not_null, f"{table}.{column}"
    assert found == COLUMNS


async def test_the_migrated_constraints_are_exactly_these_and_named_as_in_the_models(db: asyncpg.Connection) -> None:
    rows = [(table.removeprefix("mem0_cc."), name, rule) for table, name, rule in await db.fetch(CATALOGUE_CONSTRAINTS)]
    assert {row for row in rows if row[0] in COLUMNS} == CONSTRAINTS
    declared = {str(constraint.name) for table in Base.metadata.tables.values() for constraint in table.constraints}
    assert {name for _, name, _ in rows} == declared


async def test_records_are_found_by_request_by_trace_and_by_time(db: asyncpg.Connection) -> None:
    rows = await db.fetch("SELECT indexdef FROM pg_indexes WHERE indexname LIKE 'ix_base_log_%'")
    found = {row["indexdef"].partition(" USING ")[2] for row in rows}
    assert found == {"btree (request_id)", "btree (trace_id)", 'btree ("timestamp")'}


async def test_what_the_models_write_they_read(session: AsyncSession) -> None:
    prompt, event = (
        BaseLog(id=uuid4(), timestamp=datetime.now(UTC), source_module="cc", request_id="r", trace_id="0" * 32)
        for _ in range(2)
    )
    session.add_all([prompt, event])
    await session.flush()
    session.add(PromptTrace(base_log_id=prompt.id, role="user", content="hi", tokens_in=1, tokens_out=2))
    session.add(EventLog(base_log_id=event.id, event_type="tool.called", payload={"a": [1, None]}))
    await session.commit()
    stored = (await session.scalars(select(EventLog).where(EventLog.base_log_id == event.id))).one()
    assert stored.payload == {"a": [1, None]}
    assert (await session.get_one(PromptTrace, prompt.id)).tokens_out == 2
