"""Bounds on the time that streams take: silent senders, silent readers, endless ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from memsvc import errors

T = TypeVar("T")


@asynccontextmanager
async def within(seconds: float, limit: str) -> AsyncIterator[None]:
    """Ends the block with STREAM_TIMEOUT after so long; 0: never.

    limit: the name of the setting or quota.
    """
    try:
        async with asyncio.timeout(seconds or None) as bound:
            yield
    except TimeoutError as error:
        if not bound.expired():
            raise
        raise errors.stream_timeout(limit, seconds) from error


async def received(messages: AsyncIterator[T], idle_s: float) -> AsyncIterator[T]:
    """The messages, as long as each comes in time."""
    iterator = aiter(messages)
    while True:
        async with within(idle_s, "stream_idle_s"):
            try:
                message = await anext(iterator)
            except StopAsyncIteration:
                return
        yield message
