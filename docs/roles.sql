-- The two roles of the service's database, to be run by a superuser, in that database, before the first
-- `alembic upgrade head`. Give them passwords, or another way to log in, as you do for any role:
--     ALTER ROLE cc_migrations PASSWORD '...'; ALTER ROLE cc_runtime PASSWORD '...';
-- Roles belong to the whole server: for its second database leave out the two lines that create them.

BEGIN; -- all of it or nothing

-- Runs the migrations: DATABASE_URL of `alembic upgrade head`. Owns the schema and all that is in it.
CREATE ROLE cc_migrations LOGIN;
CREATE SCHEMA mem0_cc AUTHORIZATION cc_migrations;
-- Alembic's own table lives in `public`.
GRANT USAGE, CREATE ON SCHEMA public TO cc_migrations;

-- Runs the service: DATABASE_URL of uvicorn. It adds records and can neither read, change nor delete one. The retry
-- after a broken connection needs no more: ON CONFLICT DO NOTHING without a target looks at no column.
CREATE ROLE cc_runtime LOGIN;
GRANT USAGE ON SCHEMA mem0_cc TO cc_runtime;
-- PostgreSQL's own default. Where the server's is stricter, concurrent records would refuse each other for nothing.
ALTER ROLE cc_runtime SET default_transaction_isolation = 'read committed';
-- A statement that waits for a lock ends soon after its client has gone. Otherwise its server process would wait on, and
-- those of a few seconds fill max_connections. PostgreSQL 13 and older have no such setting.
DO $$ BEGIN
    IF current_setting('server_version_num')::int >= 140000 THEN
        ALTER ROLE cc_runtime SET client_connection_check_interval = '1s';
    END IF;
END $$;
ALTER DEFAULT PRIVILEGES FOR ROLE cc_migrations IN SCHEMA mem0_cc GRANT INSERT ON TABLES TO cc_runtime;

COMMIT;

-- A `downgrade base` drops the schema, and what was granted on it. Before the next upgrade run CREATE SCHEMA, GRANT USAGE
-- ON SCHEMA mem0_cc and ALTER DEFAULT PRIVILEGES again.
