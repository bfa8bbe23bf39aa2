"""A caller who leaves while what it asked for is being committed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from typing import Any

from grpc import aio

from tests.support.served import Served

_UNDER_WAY_S, _NOTICED_S = 0.2, 0.1


async def cut_at_commit(served: Served, method: str, begin: Callable[[], Any]) -> None:
    """Begins a call and cancels it while the catalog's method waits for SQLite's lock, held
    here; returns when the method, which then commits, has ended."""
    catalog: Any = served.server.application.catalog
    real, reached, ended = getattr(catalog, method), asyncio.Event(), asyncio.Event()
    with closing(sqlite3.connect(served.server.application.config.folder.catalog)) as other:

        async def held(*args: Any, **kwargs: Any) -> Any:
            other.execute("BEGIN IMMEDIATE")
            reached.set()
            try:
                return await real(*args, **kwargs)
            finally:
                ended.set()

        setattr(catalog, method, held)
        call = begin()
        task = asyncio.ensure_future(_quiet(call))
        await reached.wait()
        await asyncio.sleep(_UNDER_WAY_S)
        call.cancel()
        await asyncio.sleep(_NOTICED_S)
        other.rollback()
        await ended.wait()
        setattr(catalog, method, real)
    await task


async def _quiet(call: Awaitable[Any]) -> None:
    with suppress(asyncio.CancelledError, aio.AioRpcError):
        await call
