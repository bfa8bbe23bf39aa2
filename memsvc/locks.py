"""One writer per memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

#: Tenant uid and memory id. Not the memory's uid, so that the row can be read
#: inside the lock alone.
MemoryKey = tuple[str, str]


class MemoryLocks:
    """Locks by memory, made when wanted and dropped when nobody wants them."""

    def __init__(self) -> None:
        self._locks: dict[MemoryKey, asyncio.Lock] = {}
        self._users: dict[MemoryKey, int] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._abandoned: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def exclusive(self, tenant_uid: str, memory_id: str) -> AsyncIterator[None]:
        """Holds the memory's write lock. Waiting can be cancelled; waiters are served in order."""
        key = (tenant_uid, memory_id)
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]

    async def run_whole(
        self, tenant_uid: str, memory_id: str, work: Callable[[], Awaitable[T]]
    ) -> T:
        """Runs work under the lock, from its start to its end.

        Cancelling the caller while it waits for the lock cancels everything;
        afterwards the work goes on, and keeps the lock, until it is done. It may
        ask `caller_left` while it can still be undone.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def locked() -> T:
            async with self.exclusive(tenant_uid, memory_id):
                started.set_result(None)
                return await work()

        task = asyncio.ensure_future(locked())
        self._running.add(task)
        task.add_done_callback(self._ended)
        try:
            waited: set[asyncio.Future[Any]] = {task, started}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not started.done():
                task.cancel()
            elif not task.done():
                self._abandoned.add(task)
            raise

    def caller_left(self) -> bool:
        """Asked by work that run_whole runs: whether its caller was cancelled meanwhile."""
        return asyncio.current_task() in self._abandoned

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # Fetched, as its caller may be gone.

    async def drain(self) -> None:
        """Returns when no work runs that outlived its caller."""
        while self._running:
            await asyncio.wait(set(self._running))
