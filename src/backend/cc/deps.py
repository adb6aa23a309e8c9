"""What endpoints are given: the request's session, and `log_l1` bound to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Protocol
from uuid import UUID

from fastapi import Depends
from fastapi.requests import HTTPConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.errors import DatabaseError, database_error
from backend.cc.records import Record
from backend.cc.services.logging import log_l1


async def get_db_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """Yield the session of the request, or of the WebSocket; commit what is open on it before the response is sent.

    A request that never uses the session opens no connection. A transaction that a query began is committed, together
    with the records that joined it. After an error it is rolled back. After the end of the request, in a background
    task or while the response is streamed, `log_l1` still commits, and a query is an InvalidRequestError. Where a query
    or the commit failed, a DatabaseError is raised, and no response has been sent.
    """
    database = connection.state.database
    session: AsyncSession = database.session()
    connection.state.session = session  # for `get_log_l1`
    try:
        yield session
        if session.in_transaction():
            await database.commit(session)
    except SQLAlchemyError as error:
        # The endpoint's own query failed. The original is dropped, because its text repeats the row.
        raise database_error(error) from None
    finally:
        if session.in_transaction():
            # Shielded, because a second cancellation would interrupt the rollback and cost the connection. Errors are
            # suppressed, because a dead connection has nothing to roll back. The response stays as it is.
            with contextlib.suppress(DatabaseError, SQLAlchemyError):
                await asyncio.shield(session.close())
        else:
            session.sync_session.close()  # without a transaction nothing has to be awaited


# scope="function": by default a dependency ends after the response, so the client would get a 200 before the commit.
DBSession = Annotated[AsyncSession, Depends(get_db_session, scope="function")]
"""An endpoint's parameter that is the request's session."""


class BoundLogL1(Protocol):
    """`log_l1` with its session given; see `backend.cc.services.logging`."""

    async def __call__(
        self, record: Record, *, request_id: str | None = None, record_id: UUID | None = None
    ) -> UUID: ...


async def get_log_l1(connection: HTTPConnection) -> BoundLogL1:
    """Return `log_l1`, bound to the request's session, or to a cheaper, shared one if the endpoint only logs."""

    async def bound(record: Record, *, request_id: str | None = None, record_id: UUID | None = None) -> UUID:
        # Looked up at the call, because FastAPI may solve this dependency before the session.
        return await log_l1(connection.state.session, record, request_id=request_id, record_id=record_id)

    return bound


LogL1 = Annotated[BoundLogL1, Depends(get_log_l1)]
"""An endpoint's parameter that is `log_l1`, bound to the request's session."""
