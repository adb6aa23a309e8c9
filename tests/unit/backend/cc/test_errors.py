import re
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import exc

from backend.cc.errors import ConnectError, DatabaseUnavailableError, database_error


class Wrapped(exc.DBAPIError):
    """An error of the driver, as SQLAlchemy hands it on."""

    def __init__(self, error: Exception) -> None:
        super().__init__("INSERT a secret", {"content": "a secret"}, error)


def of_state(state: str) -> asyncpg.PostgresError:
    error = asyncpg.PostgresError("a secret")
    error.sqlstate = state
    return error


# SQLSTATEs (PostgreSQL manual, appendix A): of the server's condition, and of what is wrong with the statement.
UNAVAILABLE = re.findall(
    r"\w{5}",
    "08000 08006 08P01 25006 25P01 25P03 25P04 26000 28000 28P01 3D000 40001 40P01 42P05 53100 53300 55006 55P03 57014"
    " 57P01 57P03 58000 58030 XX000 XX001 XX002",
)
REFUSED = re.findall(
    r"\w{5}", "0A000 22001 22P05 23505 23514 25001 25P02 3F000 42501 42601 42P01 42P07 55000 58P01 P0001"
)


@pytest.mark.parametrize("state", [*UNAVAILABLE, *REFUSED])
@pytest.mark.parametrize("wrap", [Wrapped, lambda error: error], ids=["sqlalchemy", "asyncpg"])
def test_the_servers_condition_is_an_outage_and_what_is_wrong_with_the_statement_a_refusal(
    state: str, wrap: type[Wrapped]
) -> None:
    error = database_error(wrap(of_state(state)))
    is_unavailable = state in UNAVAILABLE
    assert isinstance(error, DatabaseUnavailableError) is is_unavailable
    assert error.code == error.sqlstate == state
    text = "the database is unavailable" if is_unavailable else "PostgreSQL refused the statement"
    assert str(error).startswith(f"{text} (SQLSTATE {state})")


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ("25P02", "an earlier statement of the transaction has failed"),
        ("26000", "is there a pooler without prepared statements? See docs/operations.md"),
        ("28P01", "the user or the password of DATABASE_URL is refused"),
        ("3D000", "there is no such database"),
        ("42501", "the role lacks a privilege, see docs/roles.sql"),
        ("3F000", "has `alembic upgrade head` been run?"),
        ("55P03", "another transaction holds a lock"),
    ],
)
def test_an_error_that_somebody_can_put_right_says_how(state: str, hint: str) -> None:
    assert hint in str(database_error(of_state(state)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SSLCertVerificationError", "and its authority in sslrootcert?"),
        ("SSLError", "the TLS handshake failed"),
        ("AnyOtherError", "nothing answers where DATABASE_URL points"),
    ],
)
@pytest.mark.parametrize("wrap", [Wrapped, lambda error: error], ids=["sqlalchemy", "asyncpg"])
def test_a_server_that_could_not_be_reached_is_an_outage_with_a_hint_at_its_cause(
    name: str, hint: str, wrap: type[Wrapped]
) -> None:
    error = database_error(wrap(ConnectError(name)))
    assert isinstance(error, DatabaseUnavailableError)
    assert error.sqlstate == "08001"
    assert str(error).startswith(f"the database is unavailable ({name}): ")
    assert hint in str(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError("a secret"),
        TimeoutError("a secret"),
        ConnectionRefusedError("a secret"),
        asyncpg.InterfaceError("a secret"),
        asyncpg.InternalClientError("a secret"),
        exc.TimeoutError("a secret"),
        exc.DisconnectionError("a secret"),
        exc.InvalidatePoolError("a secret"),
        Wrapped(asyncpg.InterfaceError("a secret")),
        exc.PendingRollbackError("a secret", code="8s2b"),
    ],
    ids=repr,
)
def test_an_error_of_the_connection_is_an_outage_named_by_its_class(error: Exception) -> None:
    meaning = database_error(error)
    name = type(getattr(error, "orig", error)).__name__
    assert isinstance(meaning, DatabaseUnavailableError)
    assert (meaning.code, str(meaning)) == (name, f"the database is unavailable ({name})")


@pytest.mark.parametrize(
    "error",
    [
        exc.InvalidRequestError("a secret"),
        exc.PendingRollbackError("a secret"),
        exc.UnboundExecutionError("a secret"),
        exc.StatementError("a secret", "INSERT a secret", {"content": "a secret"}, ValueError("a secret")),
        exc.ArgumentError("a secret"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_sqlalchemy_refuses_is_no_outage(error: Exception) -> None:
    meaning = database_error(error)
    assert not isinstance(meaning, DatabaseUnavailableError)
    name = "ValueError" if isinstance(error, exc.StatementError) else type(error).__name__
    assert (str(meaning), meaning.code, meaning.sqlstate) == (f"the session can't do this ({name})", name, None)


def test_an_error_that_is_translated_already_stays_itself() -> None:
    error = DatabaseUnavailableError("x", "57P01")
    error.record_id = UUID(int=7)
    assert database_error(error) is error


def test_a_state_without_a_hint_is_named_and_no_more() -> None:
    assert str(database_error(of_state("22012"))) == "PostgreSQL refused the statement (SQLSTATE 22012)"
    assert str(database_error(of_state("57014"))) == "the database is unavailable (SQLSTATE 57014)"
