"""What endpoints are given: the request's session, and `log_l1` bound to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends
from fastapi.requests import HTTPConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from backend.cc.services.logging import BoundLogL1, bind_log_l1


async def get_db_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """Yield the session of the request, or of the WebSocket; commit what is open on it before the response is sent.

    A request that never uses the session opens no connection. After an error the transaction is rolled back. After the
    end of the request, in a background task or while the response is streamed, a query is an InvalidRequestError.
    """
    session: AsyncSession = connection.state.database.session()
    try:
        yield session
        if session.in_transaction():
            await session.commit()
    finally:
        # A query after the end of the request would begin a transaction that nothing commits, and that records join.
        session.sync_session.autobegin = False
        if session.in_transaction():
            # Shielded, because a second cancellation would interrupt the rollback and cost the connection. Errors are
            # suppressed, because a dead connection has nothing to roll back. The response stays as it is.
            with contextlib.suppress(SQLAlchemyError):
                await asyncio.shield(session.close())


# scope="function": by default a dependency ends after the response, so the client would get a 200 before the commit.
DBSession = Annotated[AsyncSession, Depends(get_db_session, scope="function")]
"""An endpoint's parameter that is the request's session."""


async def get_log_l1(session: DBSession) -> BoundLogL1:
    """Return `log_l1` for what happened: committed when it returns, whatever becomes of the request.

    If `get_db_session` is overridden with a session that isn't `Database`'s, the record is written through that one.
    """
    return bind_log_l1(session)


LogL1 = Annotated[BoundLogL1, Depends(get_log_l1)]
"""An endpoint's parameter that is `log_l1`, bound to the request's session."""
