-- Partitions by month for a store that holds no records yet: the file to run once, and the two functions that add a
-- month and drop one. Run it after `alembic upgrade head` as the role that ran the migrations.
-- docs/operations.md says when a store needs it, docs/decisions/0012-partitions.md why it is built like this.
--
-- The partitions and functions live in a schema of their own, where `alembic check` does not look. If the role of the
-- migrations may not create schemas, a superuser creates this one first:
--     CREATE SCHEMA mem0_cc_months AUTHORIZATION cc_migrations;

BEGIN; -- all of it or nothing

DO $$ BEGIN
    IF to_regnamespace('mem0_cc_months') IS NULL THEN CREATE SCHEMA mem0_cc_months; END IF;
    LOCK TABLE mem0_cc.base_log;
    IF EXISTS (SELECT FROM mem0_cc.base_log) THEN
        RAISE EXCEPTION 'mem0_cc.base_log holds records: only an empty store can be partitioned';
    END IF;
END $$;

-- Returns the lower bound of the ids of a moment. A UUIDv7 begins with the milliseconds since 1970, 48 bits (RFC 9562).
CREATE OR REPLACE FUNCTION mem0_cc_months.first_id(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT rpad(lpad(to_hex(floor(extract(epoch FROM moment) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

-- Adds one partition to each table. Both rows of a record have one id, so they always lie in partitions of one suffix,
-- and the children's partitions refer to that of `base_log`.
--
-- Inserts wait while this function waits for its locks. It takes them in the order in which a prepared insert does, the
-- child's table first: in the other order it would meet an insert that holds one and waits for the other. An insert
-- that is prepared just then can still meet it. 500 ms is shorter than PostgreSQL's `deadlock_timeout`, so that then
-- this function fails and never the insert. Run it again.
CREATE OR REPLACE FUNCTION mem0_cc_months.add_partitions(suffix text, bounds text) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '500ms' AS $$
DECLARE
    child text;
BEGIN
    LOCK TABLE ONLY mem0_cc.prompt_trace, ONLY mem0_cc.event_log, ONLY mem0_cc.base_log;
    EXECUTE format(
        'CREATE TABLE IF NOT EXISTS mem0_cc_months.base_log_%s PARTITION OF mem0_cc.base_log %s', suffix, bounds
    );
    FOREACH child IN ARRAY ARRAY['prompt_trace', 'event_log'] LOOP
        EXECUTE format(
            'CREATE TABLE IF NOT EXISTS mem0_cc_months.%1$s_%2$s PARTITION OF mem0_cc.%1$s (
                 CONSTRAINT fk_%1$s_base_log_id FOREIGN KEY (base_log_id)
                 REFERENCES mem0_cc_months.base_log_%2$s (id) ON DELETE CASCADE
             ) %3$s',
            child, suffix, bounds
        );
    END LOOP;
END $$;

-- Adds the month (UTC) of a day. Does nothing where it exists.
CREATE OR REPLACE FUNCTION mem0_cc_months.add_month(day date) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    month timestamp := date_trunc('month', day::timestamp);
BEGIN
    PERFORM mem0_cc_months.add_partitions(
        to_char(month, 'YYYY_MM'),
        format(
            'FOR VALUES FROM (%L) TO (%L)',
            mem0_cc_months.first_id(month AT TIME ZONE 'UTC'),
            mem0_cc_months.first_id((month + interval '1 month') AT TIME ZONE 'UTC')
        )
    );
END $$;

-- Drops the month (UTC) of a day with its records. Does nothing where it does not exist. Locks as above.
CREATE OR REPLACE FUNCTION mem0_cc_months.drop_month(day date) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '500ms' AS $$
BEGIN
    LOCK TABLE ONLY mem0_cc.prompt_trace, ONLY mem0_cc.event_log, ONLY mem0_cc.base_log;
    EXECUTE format(
        'DROP TABLE IF EXISTS mem0_cc_months.prompt_trace_%1$s, mem0_cc_months.event_log_%1$s,
             mem0_cc_months.base_log_%1$s',
        to_char(day, 'YYYY_MM')
    );
END $$;

-- PostgreSQL cannot partition a table that exists, so one with the same columns and checks replaces it. The keys
-- and indexes get the names that the models give them. The foreign keys are on the partitions.
ALTER TABLE mem0_cc.base_log RENAME TO plain_base_log;
ALTER TABLE mem0_cc.prompt_trace RENAME TO plain_prompt_trace;
ALTER TABLE mem0_cc.event_log RENAME TO plain_event_log;
CREATE TABLE mem0_cc.base_log (LIKE mem0_cc.plain_base_log INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (id);
CREATE TABLE mem0_cc.prompt_trace (LIKE mem0_cc.plain_prompt_trace INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (base_log_id);
CREATE TABLE mem0_cc.event_log (LIKE mem0_cc.plain_event_log INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (base_log_id);
DROP TABLE mem0_cc.plain_event_log, mem0_cc.plain_prompt_trace, mem0_cc.plain_base_log;
ALTER TABLE mem0_cc.base_log ADD CONSTRAINT pk_base_log PRIMARY KEY (id);
ALTER TABLE mem0_cc.prompt_trace ADD CONSTRAINT pk_prompt_trace PRIMARY KEY (base_log_id);
ALTER TABLE mem0_cc.event_log ADD CONSTRAINT pk_event_log PRIMARY KEY (base_log_id);
CREATE INDEX ix_base_log_request_id ON mem0_cc.base_log (request_id);
CREATE INDEX ix_base_log_trace_id ON mem0_cc.base_log (trace_id);
CREATE INDEX ix_base_log_timestamp ON mem0_cc.base_log ("timestamp");

-- A record whose month has no partition is stored in these instead of being refused.
SELECT mem0_cc_months.add_partitions('default', 'DEFAULT');
SELECT mem0_cc_months.add_month((now() AT TIME ZONE 'UTC')::date);
SELECT mem0_cc_months.add_month((now() AT TIME ZONE 'UTC' + interval '1 month')::date);

COMMIT;
