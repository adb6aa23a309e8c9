"""How PostgreSQL is told to refuse a prompt, and what an exception carries."""

REFUSALS = {
    "check": "ALTER TABLE mem0_cc.prompt_trace ADD CONSTRAINT no_more CHECK (false) NOT VALID",
    "trigger": """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'refused: %', NEW USING DETAIL = NEW::text, HINT = NEW::text; END $$;
        CREATE TRIGGER refuse AFTER INSERT ON mem0_cc.prompt_trace FOR EACH ROW EXECUTE FUNCTION refuse()""",
}
"""Both repeat the row in what they say."""


def carried_by(error: BaseException | None) -> list[BaseException]:
    """Return an exception and all that it carries, whether a traceback shows them or not."""
    return [] if error is None else [error, *carried_by(error.__cause__), *carried_by(error.__context__)]
