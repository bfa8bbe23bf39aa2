"""Disks under a server in this process that are full, slow or damaged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from storage.failpoints import Failpoint, armed
from storage.store import StorageFullError

_PAGE = 4096


@contextmanager
def full_disk() -> Iterator[None]:
    """Every write of a store fails before it is committed."""

    def fail(reached: Failpoint) -> None:
        if reached is Failpoint.STORE_UNCOMMITTED:
            raise StorageFullError("disk is full")

    with armed(fail):
        yield


class Held:
    """A write of the store that hangs before it is committed, as on a slow disk."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._go_on = threading.Event()

    def __call__(self, point: Failpoint) -> None:
        if point is Failpoint.STORE_UNCOMMITTED:
            self.reached.set()
            assert self._go_on.wait(60)

    @asynccontextmanager
    async def during(self, call: Any) -> AsyncIterator[asyncio.Task[Any]]:
        """Inside, the call hangs; behind, it is done."""

        async def ended() -> Any:
            return await call

        with armed(self):
            task = asyncio.create_task(ended())
            try:
                assert await asyncio.to_thread(self.reached.wait, 60)
                yield task
            finally:
                self._go_on.set()
            await task


def damage(tenant: Path) -> bytes:
    """Spoils the pages of a store that nobody has open, so that it is not opened. Returns what
    is left of it.
    """
    data = tenant / "data.mdb"
    content = bytearray(data.read_bytes())
    for page in range(2 * _PAGE, len(content), _PAGE):
        content[page + 10 : page + 16] = b"\xff" * 6
    data.write_bytes(content)
    return bytes(content)
