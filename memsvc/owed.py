"""Memories of which documents are deleted, and may still lie in the store.

A deletion is one transaction of the catalog, then one of the store. Between the two, and for as
long as the second fails, the documents are where a worker finds them. So whoever asks a memory
that is noted here tells the worker what it must not look at.

A memory is noted before a deletion is committed, and crossed out when the store holds nothing of
what was deleted. What that is the catalog says, so that a commit of which nobody knows whether it
took place is no case of its own.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass

from storage.catalog import Catalog, MemoryRow


@dataclass
class _Noted:
    """memory: as it was when it was noted. committed: time.monotonic() of its last deletion."""

    memory: MemoryRow
    committed: float = 0.0


class Owed:
    """What is owed to the store by this process."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._noted: dict[str, _Noted] = {}

    def __contains__(self, memory_uid: str) -> bool:
        return memory_uid in self._noted

    def memories(self) -> list[MemoryRow]:
        """Those that are noted, as they were then."""
        return [noted.memory for noted in self._noted.values()]

    def note(self, memory: MemoryRow) -> None:
        """A deletion of the memory's documents is about to be committed. Again is no error."""
        self._noted.setdefault(memory.uid, _Noted(memory))

    def committed(self, memory_uid: str) -> None:
        """A deletion of a noted memory's documents was committed just now."""
        self._noted[memory_uid].committed = time.monotonic()

    def settle(self, memory_uid: str) -> None:
        """The store holds nothing of what was deleted."""
        self._noted.pop(memory_uid, None)

    def forget(self, tenant_uid: str) -> None:
        """Another server leads the tenant, and sees to it."""
        for uid, noted in list(self._noted.items()):
            if noted.memory.tenant_uid == tenant_uid:
                del self._noted[uid]

    def deleted_since(self, memory_uid: str, moment: float) -> bool:
        """Whether documents that the store may still hold were deleted after a time.monotonic()."""
        noted = self._noted.get(memory_uid)
        return noted is not None and noted.committed > moment

    async def removed(self, memory: MemoryRow) -> list[int]:
        """Numbers, ascending, of what is deleted and may still be stored, up to the memory's
        last number. Asks the catalog only for a memory that is noted.
        """
        if memory.uid not in self._noted:
            return []
        numbers = await self._catalog.removed_numbers(memory.uid)
        return numbers[: bisect_right(numbers, memory.last_number)]
