"""Brings memories from the store to where the engine reads them, within budgets.

Routing keys of resident memories lie on the device, least recently used first
out; content KV lies in RAM, per document, read only for documents that an engine
asks for. A memory whose routing keys do not fit is resident as far as they do,
and the rest is read from the store each time, slab by slab: every memory answers.

Everything is keyed by tenant and memory. A lease pins its memory and is a
snapshot: documents that come later, or lie above the asked number, are not seen.
Blocks are only ever added above those there are, except after a deletion, which
changes the memory's deletion epoch (a new epoch is read afresh) or evicts it.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch

from model_adapter.carrying import Carrier
from model_adapter.content import ContentCache, HeldContent
from model_adapter.content_pool import ContentPool
from model_adapter.derived import Derived
from model_adapter.engine import EngineError
from model_adapter.errors import MemoryInUseError, UnwantedError
from model_adapter.fetching import Fetcher, Selection
from model_adapter.keys import HeldKeys
from model_adapter.lease import Lease
from model_adapter.msa.kernels import KeyStorage
from model_adapter.paging import BlockSource, Slab
from model_adapter.readers import Readers
from model_adapter.residency import HeldMemory, MemoryKey, RoutingTable
from model_adapter.staging import CudaLane, HostLane, Staging
from storage.crypto import MemorySecret
from storage.layout import KVLayout
from storage.store import EncodingId

log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Budgets:
    """Bytes. slab_bytes: routing keys read from the store at a time.

    lexical_bytes: of all full-text indexes. attribute_bytes: of what filters look at.
    memories: kept at most, whatever their size; only pinned ones may exceed it.
    """

    routing_bytes: int
    content_bytes: int
    slab_bytes: int = 32 * 1024 * 1024
    memories: int = 4096
    lexical_bytes: int = 256 * 1024 * 1024
    attribute_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True)
class Residency:
    """What is held at a moment."""

    routing_bytes: int
    content_bytes: int
    memories: int
    evictions: int
    lexical_bytes: int
    attribute_bytes: int


class Pager:
    """Thread-safe. `lease` may take long (it reads the store); all else is quick.

    Invariants (`check_integrity`): reserved bytes are exactly those of the tables and
    within the budget; a pinned memory is never dropped; a memory that was replaced or
    evicted is wiped by its last reader; a key is held exactly as long as its memory.
    """

    def __init__(  # noqa: PLR0917 - what a pager stands on
        self,
        layout: KVLayout,
        encoding: EncodingId,
        readers: Readers,
        budgets: Budgets,
        device: torch.device,
        keys: HeldKeys | None = None,
        *,
        storing: KeyStorage | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        """storing: how kernels want routing keys on the device; None: they are not for kernels.
        fetcher: reads content out of RAM; None: it is carried."""
        self._storing = storing
        # A slab is what so many documents take on the average: most are smaller than this.
        buffer_bytes = budgets.slab_bytes * 5 // 4
        if device.type == "cuda":
            self._staging = Staging(CudaLane(device), buffer_bytes)
        else:
            self._staging = Staging(HostLane(), buffer_bytes, buffers=2)
        self._layout = layout
        self._encoding = encoding
        self._readers = readers
        self._budgets = budgets
        self.device = device
        self._keys = keys or HeldKeys()
        self._changed = threading.Condition()
        self._memories: OrderedDict[MemoryKey, HeldMemory] = OrderedDict()
        self._leaving: set[HeldMemory] = set()
        self.fetcher = fetcher
        pool = ContentPool(budgets.content_bytes, fetcher.memory) if fetcher else None
        self._content = ContentCache(budgets.content_bytes, pool)
        self._carrier = Carrier(device)
        #: What leases ask by words and by filters.
        self.derived = Derived(self.source, budgets.lexical_bytes, budgets.attribute_bytes)
        self._reserved = 0
        self._evictions = 0

    def lease(
        self,
        key: MemoryKey,
        last_number: int,
        epoch: int,
        unwanted: Callable[[], bool] = lambda: False,
        secret: MemorySecret | None = None,
    ) -> Lease:
        """Pins the memory as of `last_number` and brings in what is new of it.

        unwanted: asked first and between slabs, those that the lease reads too; when it says
        True the rest is left for another time and InterruptedQueryError is raised. secret: of an
        encrypted memory; held as long as anything of the memory is. Also raises
        CorruptRecordError, ModelMismatchError.
        """
        with self._changed:
            # Asked here too: an eviction ends the jobs that read a memory and then lets it
            # go, and who was waiting for a thread meanwhile must not bring it back.
            if unwanted():
                raise UnwantedError("the caller went away before the memory was paged in")
            memory = self._memories.get(key)
            if memory is not None and memory.epoch < epoch:
                self._let_go(memory)
                memory = None
            if memory is None:
                table = RoutingTable(self._layout, self.device, self._storing, self._staging)
                memory = HeldMemory(key, epoch, table)
                self._make_place()
                self._memories[key] = memory
            self._memories.move_to_end(key)
            self._keys.hold(key, secret)
            memory.pins += 1
        try:
            with memory.loading:
                self._page_in(memory, last_number, unwanted)
                return Lease(self, memory, last_number, unwanted)
        except BaseException as error:
            with self._changed:
                if isinstance(error, EngineError) and not isinstance(error, UnwantedError):
                    self._let_go(memory)
                self._unpin(memory)
            raise

    def _make_place(self) -> None:
        surplus = len(self._memories) + 1 - self._budgets.memories
        idle = [held for held in self._memories.values() if not held.pins]
        for held in idle[: max(surplus, 0)]:
            self._evictions += 1
            self._let_go(held)

    def evict(self, tenant: str, memory: str = "", timeout_s: float = 5.0) -> int:
        """Wipes and drops a memory, all of a tenant, or with empty names everything. Returns
        the bytes freed.

        Waits for its readers; the caller has told them to stop. Raises MemoryInUseError
        when they have not after timeout_s; what they read is then wiped by the last.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            before = self._held_bytes()
            for held in list(self._memories.values()):
                if held.key.within(tenant, memory):
                    self._let_go(held)
            while any(held.key.within(tenant, memory) for held in self._leaving):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise MemoryInUseError("the memory is still being read")
            freed = before - self._held_bytes()
        if not memory:
            self._readers.close_tenant(tenant)
        return max(freed, 0)

    @property
    def by_kernels(self) -> bool:
        """Leases have resident_keys."""
        return self._storing is not None

    def residency(self) -> Residency:
        """What is held now."""
        with self._changed:
            return Residency(
                self._reserved,
                self._content.bytes,
                len(self._memories),
                self._evictions,
                self.derived.lexical_bytes,
                self.derived.attribute_bytes,
            )

    def _held_bytes(self) -> int:
        derived = self.derived.lexical_bytes + self.derived.attribute_bytes
        return self._reserved + self._content.bytes + derived

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant does not hold. Nobody may be loading."""
        with self._changed:
            everything = [*self._memories.values(), *self._leaving]
            for held in everything:
                held.table.check_integrity()
                held.full.check_integrity()
                resident = len(held.table.index.numbers_N)
                assert (held.full.numbers_N[:resident] == held.table.index.numbers_N).all()
                assert held.reserved == held.table.bytes
                assert held.pins >= 0
            assert all(held.pins > 0 for held in self._leaving)
            assert all(key == held.key for key, held in self._memories.items())
            assert self._reserved == sum(held.reserved for held in everything)
            assert self._reserved <= self._budgets.routing_bytes
            assert {memory for memory, _ in self._content} <= set(everything)
            assert self._keys.names() == {held.key for held in everything}
            self._content.check_integrity()
            self.derived.check_integrity()

    # Loading: by the thread that holds memory.loading, of a pinned memory.

    def source(self, key: MemoryKey) -> BlockSource:
        """The memory's records in the store."""
        memory = bytes.fromhex(key.memory)
        slab_bytes = self._budgets.slab_bytes
        return BlockSource(
            self._readers,
            key.tenant,
            memory,
            encoding=self._encoding,
            layout=self._layout,
            slab_bytes=slab_bytes,
        )

    def _page_in(self, memory: HeldMemory, last_number: int, unwanted: Callable[[], bool]) -> None:
        if last_number <= memory.full.last_number and self._whole(memory):
            return
        hold = self._whole(memory) or self._could_hold(memory)
        start = (memory.table.index if hold else memory.full).last_number + 1
        last = max(last_number, memory.full.last_number)
        try:
            with closing(self.source(memory.key).slabs(start, last, self._staging.lent)) as slabs:
                for slab in slabs:
                    if unwanted():
                        raise UnwantedError("the caller went away while the memory was paged in")
                    hold = hold and self._hold(memory, slab)
                    known = bisect_right(slab.numbers, memory.full.last_number)
                    memory.full = memory.full.extended(slab.numbers[known:], slab.chunks[known:])
        finally:
            memory.table.settle()

    @staticmethod
    def _whole(memory: HeldMemory) -> bool:
        return memory.table.index.chunks == memory.full.chunks

    def _could_hold(self, memory: HeldMemory) -> bool:
        """Whether what is missing of a known memory would find room."""
        missing = memory.table.bytes_for(memory.full.chunks - memory.table.index.chunks)
        with self._changed:
            pinned = sum(held.reserved for held in self._memories.values() if held.pins)
            pinned += sum(held.reserved for held in self._leaving)
            return pinned + missing <= self._budgets.routing_bytes

    def _hold(self, memory: HeldMemory, slab: Slab) -> bool:
        """Adds the slab to the resident part; False when there is no room for it."""
        table, chunks = memory.table, sum(slab.chunks)
        if chunks > table.room:
            comfortable = max(table.comfortable(chunks), slab.expected_chunks)
            for capacity in (comfortable, chunks):
                if self._reserve(memory, table.bytes_for(capacity)) and self._add(memory, capacity):
                    break
            else:
                return False
        table.append(slab.numbers, slab.chunks, slab.keys_LCE)
        return True

    def _add(self, memory: HeldMemory, capacity: int) -> bool:
        """Adds the segment that room was reserved for; False, and nothing reserved, where the
        device has less room than the budget says.
        """
        try:
            memory.table.add_segment(capacity)
        except (MemoryError, RuntimeError) as error:  # The latter is torch's own of any device.
            wanted = memory.table.bytes_for(capacity)
            log.warning("no room for %d bytes of routing keys: %s", wanted, type(error).__name__)
            with self._changed:
                self._reserved -= wanted
                memory.reserved -= wanted
            return False
        return True

    def _reserve(self, memory: HeldMemory, wanted: int) -> bool:
        """Makes room by dropping memories that nobody reads, oldest first, if that is enough."""
        with self._changed:
            idle = [held for held in self._memories.values() if not held.pins and held.reserved]
            free = self._budgets.routing_bytes - self._reserved
            if free + sum(held.reserved for held in idle) < wanted:
                return False
            while self._budgets.routing_bytes - self._reserved < wanted:
                self._evictions += 1
                self._let_go(idle.pop(0))
            self._reserved += wanted
            memory.reserved += wanted
            return True

    # Letting go: under self._changed.

    def _let_go(self, memory: HeldMemory) -> None:
        """No new lease gets it; it is wiped now or by its last reader."""
        if self._memories.get(memory.key) is memory:
            del self._memories[memory.key]
            self._leaving.add(memory)
            self._wipe_if_left(memory)

    def _unpin(self, memory: HeldMemory) -> None:
        memory.pins -= 1
        self._wipe_if_left(memory)

    def _wipe_if_left(self, memory: HeldMemory) -> None:
        if memory in self._leaving and not memory.pins:
            memory.table.wipe()
            self._staging.wipe()
            self._carrier.wipe()
            self._content.drop_memory(memory)
            self.derived.drop(memory)
            self._reserved -= memory.reserved
            memory.reserved = 0
            self._leaving.discard(memory)
            others = (held.key for held in self._leaving)
            if memory.key not in self._memories and memory.key not in others:
                self._keys.drop(memory.key)
            self._changed.notify_all()

    # For leases.

    def release(self, memory: HeldMemory) -> None:
        """Ends a lease."""
        with self._changed:
            self._unpin(memory)

    def discard(self, memory: HeldMemory) -> None:
        """Reads the memory afresh next time: something of it was wrong."""
        with self._changed:
            self._let_go(memory)

    def content(
        self,
        memory: HeldMemory,
        wanted: Sequence[tuple[int, bool]],
        take: Callable[[Sequence[HeldContent], Carrier, int], _T],
    ) -> _T:
        """What `take` makes of documents' content, read from the store unless held in RAM.

        wanted: numbers, and whether the keys are needed though routing keys are the keys. take:
        called under the lock, with the cache's `drops`; must copy.
        """
        source, read = self.source(memory.key), dict[int, HeldContent]()
        try:
            while True:
                with self._changed:
                    held = [self._content.find(memory, *one, read) for one in wanted]
                    found = [content for content in held if content is not None]
                    if len(found) == len(held):
                        return take(found, self._carrier, self._content.drops)
                missing = [one for one, content in zip(wanted, held, strict=True) if not content]
                read.update({one[0]: source.content(*one) for one in missing})
        finally:
            with self._changed:
                for number, content in read.items():
                    if not self._content.put(memory, number, content):
                        content.wipe()

    def fetch(self, selection: Selection, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values; None if what was selected may have been dropped meanwhile."""
        with self._changed:
            if self.fetcher is None or selection.drops != self._content.drops:
                return None
            return self.fetcher(selection, layer)

    @property
    def drops(self) -> int:
        """How often content was dropped."""
        return self._content.drops
