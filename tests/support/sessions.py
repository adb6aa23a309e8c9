"""How a record is written through a session: alone, or joined to its transaction."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

Begin = Callable[[AsyncSession], AbstractAsyncContextManager[object]]

alone_and_joined = pytest.mark.parametrize(
    "begin", [contextlib.nullcontext, AsyncSession.begin], ids=["alone", "joined"]
)
