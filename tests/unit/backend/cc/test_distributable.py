"""Schema and statements stay in the form that Citus distributes by the record's id. See docs/operations.md."""

import re

import asyncpg
import pytest

from backend.cc.services.logging import INSERT_EVENT, INSERT_PROMPT

DISTRIBUTED_BY = {"base_log": "id", "prompt_trace": "base_log_id", "event_log": "base_log_id"}
"""The tables that are distributed. A service's own tables need not be."""

UNIQUE_KEYS = """
SELECT c.relname, array_agg(a.attname::text) FROM pg_index i
JOIN pg_class c ON c.oid = i.indrelid
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
WHERE c.relnamespace = 'mem0_cc'::regnamespace AND c.relname = ANY($1) AND i.indisunique
GROUP BY c.relname, i.indexrelid
"""

FOREIGN_KEYS = """
SELECT child.relname, parent.relname, array_agg((a.attname::text, b.attname::text)) FROM pg_constraint f
JOIN pg_class child ON child.oid = f.conrelid
JOIN pg_class parent ON parent.oid = f.confrelid
CROSS JOIN LATERAL unnest(f.conkey, f.confkey) AS pair (child_column, parent_column)
JOIN pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = pair.child_column
JOIN pg_attribute b ON b.attrelid = f.confrelid AND b.attnum = pair.parent_column
WHERE f.connamespace = 'mem0_cc'::regnamespace AND child.relname = ANY($1) AND f.contype = 'f'
GROUP BY child.relname, parent.relname, f.oid
"""

INSERT = re.compile(r"INSERT INTO mem0_cc\.(\w+) \(([^)]*)\)\s+VALUES \(([^)]*)\)")


async def test_every_key_of_the_migrated_tables_contains_the_distribution_column(db: asyncpg.Connection) -> None:
    unique = await db.fetch(UNIQUE_KEYS, DISTRIBUTED_BY.keys())
    assert {table for table, _ in unique} == DISTRIBUTED_BY.keys()
    for table, columns in unique:
        assert DISTRIBUTED_BY[table] in columns
    foreign = await db.fetch(FOREIGN_KEYS, DISTRIBUTED_BY.keys())
    assert {child for child, _, _ in foreign} == {"prompt_trace", "event_log"}
    for child, parent, pairs in foreign:
        assert (DISTRIBUTED_BY[child], DISTRIBUTED_BY[parent]) in [tuple(pair) for pair in pairs]


@pytest.mark.parametrize(
    ("statement", "child"), [(INSERT_PROMPT, "prompt_trace"), (INSERT_EVENT, "event_log")], ids=["prompt", "event"]
)
def test_the_statement_goes_to_one_shard(statement: str, child: str) -> None:
    parts = INSERT.findall(statement)
    assert [table for table, _, _ in parts] == ["base_log", child], "the parent first, or its foreign key fails"
    for table, columns, values in parts:
        value_of = dict(zip(columns.split(", "), values.split(", "), strict=True))
        assert value_of[DISTRIBUTED_BY[table]] == "$1", "the client's id in every part"
    assert "SELECT" not in statement.upper(), "or the coordinator pulls the rows and commits in two phases"
    assert statement.endswith("\nRETURNING $1"), "the id that was given, and nothing of the row"
    assert statement.upper().count("RETURNING") == 1
    assert statement.upper().count("INSERT") == len(parts)
