"""One look for all who want to know the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")


class Looks(Generic[Key, Found]):
    """At most one look at a key runs, and one waits; whoever comes meanwhile shares the second.

    look: what finds it out. For one event loop.
    """

    def __init__(self, look: Callable[[Key], Awaitable[Found]]) -> None:
        self._look = look
        self._running: dict[Key, asyncio.Task[Found]] = {}
        self._waiting: dict[Key, asyncio.Task[Found]] = {}

    async def fresh(self, key: Key) -> Found:
        """What a look found that began after this call did. Raises what the look raises."""
        shared = self._waiting.get(key)
        if shared is None:
            shared = asyncio.create_task(self._after_running(key))
            shared.add_done_callback(_seen)
            self._waiting[key] = shared
        # One that leaves must not take it away from the others.
        return await asyncio.shield(shared)

    async def _after_running(self, key: Key) -> Found:
        running = self._running.get(key)
        if running is not None:
            await asyncio.wait([running])
        self._running[key] = self._waiting.pop(key)
        try:
            return await self._look(key)
        finally:
            del self._running[key]


def _seen(task: asyncio.Task[Found]) -> None:
    """Its failure is told to those who wait; nobody may be left."""
    if not task.cancelled():
        task.exception()
