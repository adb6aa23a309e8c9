"""Create schema `mem0_cc` with `base_log`, `prompt_trace` and `event_log`.

Revision ID: 5ab77549065e
Revises:
Create Date: 2026-11-22 11:49:54.368749+00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "5ab77549065e"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

SCHEMA = "mem0_cc"


def upgrade() -> None:
    """Create the schema and its tables."""
    # An administrator may have created the schema, because the migrating role may not. IF NOT EXISTS would fail for
    # that role: PostgreSQL checks the privilege before it looks whether the schema exists.
    op.execute(f"DO $$ BEGIN IF to_regnamespace('{SCHEMA}') IS NULL THEN CREATE SCHEMA {SCHEMA}; END IF; END $$")
    op.create_table(
        "base_log",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("source_module", sa.String(length=255), nullable=False),
        sa.Column("request_id", sa.String(length=255), nullable=False),
        sa.Column("trace_id", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base_log")),
        schema=SCHEMA,
    )
    for column in ("request_id", "trace_id", "timestamp"):
        op.create_index(op.f(f"ix_base_log_{column}"), "base_log", [column], schema=SCHEMA)
    op.create_table(
        "prompt_trace",
        sa.Column("base_log_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.String(length=255), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("tokens_in", sa.Integer(), nullable=False),
        sa.Column("tokens_out", sa.Integer(), nullable=False),
        sa.CheckConstraint("tokens_in >= 0", name=op.f("ck_prompt_trace_tokens_in_not_negative")),
        sa.CheckConstraint("tokens_out >= 0", name=op.f("ck_prompt_trace_tokens_out_not_negative")),
        sa.ForeignKeyConstraint(
            ["base_log_id"],
            [f"{SCHEMA}.base_log.id"],
            name=op.f("fk_prompt_trace_base_log_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("base_log_id", name=op.f("pk_prompt_trace")),
        schema=SCHEMA,
    )
    op.create_table(
        "event_log",
        sa.Column("base_log_id", sa.Uuid(), nullable=False),
        sa.Column("event_type", sa.String(length=255), nullable=False),
        sa.Column("payload", postgresql.JSONB(), nullable=False),
        sa.ForeignKeyConstraint(
            ["base_log_id"],
            [f"{SCHEMA}.base_log.id"],
            name=op.f("fk_event_log_base_log_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("base_log_id", name=op.f("pk_event_log")),
        schema=SCHEMA,
    )


def downgrade() -> None:
    """Drop the tables with their records, and the schema."""
    for table in ("event_log", "prompt_trace", "base_log"):
        op.drop_table(table, schema=SCHEMA)
    # Fails, and takes nothing, where someone has put something of their own there.
    op.execute(f"DROP SCHEMA {SCHEMA}")
