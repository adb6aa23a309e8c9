"""The service with more endpoints, as modules to come will have: they query, they join, they fail."""

import asyncio
from typing import Annotated

from fastapi import Body, HTTPException
from pydantic import BaseModel
from sqlalchemy import text

from backend.cc.cc_main import app
from backend.cc.deps import DBSession, LogL1
from backend.cc.records import EventRecord, PromptRecord
from backend.cc.services.logging import log_l1 as log_into

__all__ = ["app"]

Text = Annotated[str, Body(embed=True)]


@app.post("/query")
async def query(session: DBSession) -> None:
    """Ask the database something, without `log_l1`."""
    await session.execute(text("SELECT 1"))


@app.post("/joined")
async def joined(content: Text, session: DBSession) -> None:
    """Log inside the transaction that an earlier query began."""
    await session.execute(text("SELECT 1"))
    await log_into(session, PromptRecord("user", content))
    await log_into(session, EventRecord("joined", {"content": content}))


@app.post("/refused-query")
async def refused_query(content: Text, session: DBSession) -> None:
    """Run a statement that PostgreSQL refuses with the parameter in its message."""
    await session.execute(text("SELECT CAST(CAST(:content AS text) AS integer)"), {"content": content})


@app.post("/crash")
async def crash(content: Text, log_l1: LogL1) -> None:
    """Fail with an exception that says what it was working on."""
    await log_l1(PromptRecord("user", content))
    raise RuntimeError(content)


@app.post("/crash-in-transaction")
async def crash_in_transaction(content: Text, session: DBSession) -> None:
    """The same with something still to be committed."""
    await session.execute(text("SELECT 1"))
    await log_into(session, PromptRecord("user", content))
    try:
        raise ValueError(content)
    except ValueError as error:
        raise ExceptionGroup(content, [error]) from error


class Number(BaseModel):
    """Not what the content is."""

    n: int


@app.post("/crash-in-validation")
async def crash_in_validation(content: Text) -> None:
    """Fail with an exception that repeats its input."""
    Number.model_validate({"n": content})


@app.post("/refuse")
async def refuse(session: DBSession, seconds: Annotated[float, Body(embed=True)]) -> None:
    """Begin a transaction, take some time, then refuse the request."""
    await session.execute(text("SELECT 1"))
    await asyncio.sleep(seconds)
    raise HTTPException(409)
