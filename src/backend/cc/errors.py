"""What a database error means: two exceptions, and the SQLSTATEs that lead to each."""

import re
from typing import Final
from uuid import UUID

import asyncpg
from sqlalchemy import exc
from sqlalchemy.exc import SQLAlchemyError

# What a database call raises, through SQLAlchemy or directly from asyncpg and the network.
_DRIVER_ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
DATABASE_ERRORS: Final = (SQLAlchemyError, exc.EmulatedDBAPIException, *_DRIVER_ERRORS, OSError)
# SQLSTATEs after which an open connection is replaced. Its server has become read-only; or asyncpg's state of it is
# wrong: a transaction has ended, a prepared statement is gone, or another client of the pooler has prepared it.
STALE_CONNECTION: Final = frozenset({"25006", "25P01", "26000", "42P05"})
# How a SQLSTATE begins after which the statement may have been committed all the same.
UNKNOWN_OUTCOME: Final = ("08", "40003", "57P", "XX")

# Classes of SQLSTATE, and SQLSTATEs (PostgreSQL manual, appendix A), that describe the server's condition and not the
# statement: no connection, login refused, no such database, rolled back because of another transaction, out of disk or
# connections, shutting down, internal error; read-only, idle or busy for too long, in use, locked, failing hardware.
_UNAVAILABLE: Final = STALE_CONNECTION.union(
    ["08", "28", "3D", "40", "53", "57", "XX"], ["25P03", "25P04", "55006", "55P03", "58000", "58030"]
)

# Causes that an operator or the caller can mend.
_HINTS: Final = {
    "25P02": ": an earlier statement of the transaction has failed",
    **dict.fromkeys(["26000", "42P05"], ": is there a pooler without prepared statements? See docs/operations.md"),
    "28000": ": the user of DATABASE_URL is refused, or pg_hba.conf allows no such connection, e.g. without TLS",
    "28P01": ": the user or the password of DATABASE_URL is refused",
    "3D000": ": there is no such database",
    "42501": ": the role lacks a privilege, see docs/roles.sql",
    "42P07": ": a table of this name exists already; migrations run once, on Citus at the coordinator",
    "55P03": ": another transaction holds a lock",
    **dict.fromkeys(["3F000", "42P01", "42703"], ": has `alembic upgrade head` been run?"),
}
# The same for what `connect` met instead of a server, by the class of the error.
_NO_SERVER: Final = ": nothing answers where DATABASE_URL points, or a parameter in it is wrong"
_CONNECT_HINTS: Final = {
    "ClientConfigurationError": ": a parameter of DATABASE_URL is wrong, or sslmode=verify-full lacks an sslrootcert",
    "ConnectionError": ": the server refuses such a connection; does it offer the TLS that sslmode asks for?",
    "FileNotFoundError": ": a file or a socket that DATABASE_URL names isn't there",
    "SSLCertVerificationError": ": is the host in the server's certificate, and its authority in sslrootcert?",
    "SSLError": ": the TLS handshake failed",
    "TargetServerAttributeNotMatched": ": no server is what target_session_attrs asks for",
}


class ConnectError(asyncpg.ClientCannotConnectError):  # type: ignore[misc]
    """No server could be reached. Its text is the class of the original error, whose own text has the address."""


class DatabaseError(Exception):
    """PostgreSQL did not acknowledge what it was asked for. Says why, and nothing of the statement.

    Attributes:
        code: The SQLSTATE, or the class of the original error.
        record_id: The id of the record that `log_l1` tried to write; None if the error is not from `log_l1`.
    """

    def __init__(self, message: str = "", code: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.record_id: UUID | None = None

    @property
    def sqlstate(self) -> str | None:
        """The SQLSTATE, if PostgreSQL or its driver gave one."""
        return self.code if re.fullmatch("[0-9A-Z]{5}", self.code) else None


class DatabaseUnavailableError(DatabaseError):
    """The database can't be used now, and the statement is not to blame: a retry may help.

    The record may have been stored all the same. `log_l1` with this `record_id` then stores it exactly once.
    """


def database_error(error: BaseException) -> DatabaseError:
    """Return what one of `DATABASE_ERRORS` means: DatabaseUnavailableError where a retry may help, else DatabaseError.

    The original's text is left out, because it repeats the row.
    """
    if isinstance(error, DatabaseError):
        return error
    cause = error
    while orig := getattr(cause, "orig", None):  # SQLAlchemy's, which wraps an emulated one, which wraps asyncpg's
        cause = orig
    if isinstance(cause, ConnectError):
        hint = _CONNECT_HINTS.get(str(cause), _NO_SERVER)
        return DatabaseUnavailableError(f"the database is unavailable ({cause}){hint}", "08001")
    if (state := getattr(cause, "sqlstate", None)) is None:
        name = type(cause).__name__
        is_the_databases = isinstance(error, exc.DBAPIError | exc.DisconnectionError | exc.TimeoutError)
        # "8s2b": a transaction that goes on after its connection has died (https://sqlalche.me/e/8s2b).
        if is_the_databases or not isinstance(error, SQLAlchemyError) or error.code == "8s2b":
            return DatabaseUnavailableError(f"the database is unavailable ({name})", name)
        # SQLAlchemy refused before it asked the database: a closed session, a missing parameter.
        return DatabaseError(f"the session can't do this ({name})", name)
    hint = _HINTS.get(state, "")
    if {state, state[:2]} & _UNAVAILABLE:
        return DatabaseUnavailableError(f"the database is unavailable (SQLSTATE {state}){hint}", state)
    return DatabaseError(f"PostgreSQL refused the statement (SQLSTATE {state}){hint}", state)
