"""Clients of an application in the same process."""

import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from backend.cc.cc_main import Service

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have httpx2
    from fastapi.testclient import TestClient

__all__ = ["TestClient", "client_of"]


@asynccontextmanager
async def client_of(app: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client to which an unhandled exception is a 500, as to any other. The application's connections close."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.database, httpx.AsyncClient(transport=transport, base_url="http://cc") as client:
        yield client
