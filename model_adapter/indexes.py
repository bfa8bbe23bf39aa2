"""Indexes of memories in use, one kind of them, within a budget of bytes.

An index (of words, of attributes) is derived from the documents, as a block is, and lives
shorter: it is made for the first question that asks for it, follows appends, and goes with
its memory or when room is needed. It is never written anywhere.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from model_adapter.residency import HeldMemory

#: Documents added between two looks at the budget and at whether the caller still waits.
BATCH_DOCUMENTS = 512

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Found = TypeVar("Found")

#: (number, what is indexed of it) of the documents from a number on, ascending.
Documents = Callable[[int], Iterable[tuple[int, Item]]]


class MemoryIndex(Protocol[Item_contra]):
    """An index of one memory. last_number: of the last document in it; 0 for none."""

    last_number: int

    @property
    def bytes(self) -> int:
        """That it takes now."""

    def add(self, documents: Iterable[tuple[int, Item_contra]]) -> None:
        """Documents above last_number, ascending."""

    def wipe(self) -> None:
        """Overwrites and frees. Nothing else is called afterwards."""


Kind = TypeVar("Kind", bound=MemoryIndex[Any])


@dataclass(eq=False)
class _Entry(Generic[Kind]):
    """One memory's index. busy: held by whoever builds, asks or wipes it.

    size: bytes, as last accounted. needed: bytes it had when it did not fit; 0 when it did.
    """

    index: Kind | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)
    size: int = 0
    needed: int = 0
    gone: bool = False


class Indexes(Generic[Kind]):
    """Thread-safe; different memories are built and asked side by side."""

    def __init__(self, make: Callable[[], Kind], budget_bytes: int) -> None:
        self._make = make
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[HeldMemory, _Entry[Kind]] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Of all indexes now."""
        with self._lock:
            return self._bytes

    def ask(
        self,
        memory: HeldMemory,
        question: Callable[[Kind], Found],
        *,
        documents: Documents[Any],
        check_wanted: Callable[[], None],
    ) -> Found | None:
        """What the question finds in the memory's index; None when that has no room.

        The index is brought up to the last of the documents first. check_wanted: called
        between batches; what it raises ends the work, and what was added stays. An index that
        fails at a batch is made afresh for the next question. The memory must be pinned.
        """
        entry = self._take(memory)
        try:
            if entry.index is None and not self._worth_trying(entry):
                return None
            if entry.index is None:
                entry.index = self._make()
            for batch in batches(documents(entry.index.last_number + 1)):
                check_wanted()
                try:
                    entry.index.add(batch)
                except BaseException:
                    with self._lock:  # Who knows how much of the batch is in it.
                        self._start_over(entry)
                    raise
                if not self._account(entry):
                    return None
            return question(entry.index)
        finally:
            entry.busy.release()

    def drop(self, memory: HeldMemory) -> None:
        """Wipes a memory's index. Nobody may be searching it, nor come to."""
        with self._lock:
            entry = self._entries.pop(memory, None)
            if entry is not None:
                self._wipe(entry)

    def check_integrity(self) -> None:
        """Raises AssertionError when the count of bytes is wrong or over the budget."""
        with self._lock:
            assert self._bytes == sum(entry.size for entry in self._entries.values())
            assert self._bytes <= self._budget

    def _take(self, memory: HeldMemory) -> _Entry[Kind]:
        """The memory's entry, held by the caller and the most recently used."""
        while True:
            with self._lock:
                entry = self._entries.setdefault(memory, _Entry[Kind]())
                self._entries.move_to_end(memory)
            entry.busy.acquire()
            if not entry.gone:
                return entry
            entry.busy.release()  # it made room for another in between

    def _worth_trying(self, entry: _Entry[Kind]) -> bool:
        """Whether an index that did not fit would now."""
        with self._lock:
            others = sum(e.size for e in self._entries.values() if e.busy.locked())
            return entry.needed + others <= self._budget

    def _account(self, entry: _Entry[Kind]) -> bool:
        """Counts the entry's growth, dropping idle indexes for it; False: it is dropped itself."""
        assert entry.index is not None
        size = entry.index.bytes
        with self._lock:
            self._bytes += size - entry.size
            entry.size = size
            for memory, other in list(self._entries.items()):
                if self._bytes <= self._budget:
                    return True
                if other is not entry and other.busy.acquire(blocking=False):
                    del self._entries[memory]
                    self._wipe(other)
                    other.busy.release()
            if self._bytes <= self._budget:
                return True
            self._start_over(entry)
            entry.needed = size
            return False

    def _start_over(self, entry: _Entry[Kind]) -> None:
        """Under the lock: the entry, which the caller holds, is as it was without an index."""
        self._wipe(entry)
        entry.gone = False

    def _wipe(self, entry: _Entry[Kind]) -> None:
        """Under the lock, and with the entry in nobody else's hands."""
        if entry.index is not None:
            entry.index.wipe()
        self._bytes -= entry.size
        entry.index, entry.size, entry.gone = None, 0, True


def batches(documents: Iterable[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """In lists of some hundred."""
    remaining = iter(documents)
    while batch := list(islice(remaining, BATCH_DOCUMENTS)):
        yield batch
