"""What a worker holds of memories: tensors and their byte counts. No I/O, no locking.

Shape suffixes as in `storage.layout`; N documents.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.msa.kernels import KeyStack, KeyStorage, Part, ResidentKeys, Spans
from model_adapter.staging import Staging
from model_adapter.tensors import TORCH_DTYPE, copy_into, wipe
from storage.layout import KVLayout

#: Room in the smallest segment.
_FEWEST_CHUNKS = 16
#: Chunks of coarse keys that are made floats of at a time.
_SLAB_CHUNKS = 65536


@dataclass(frozen=True, eq=False)
class Index:
    """Which documents a table holds and where their chunks are.

    numbers_N ascends; document n owns chunks [offsets_N1[n], offsets_N1[n + 1]).
    """

    numbers_N: npt.NDArray[np.int64]
    offsets_N1: npt.NDArray[np.int64]

    @classmethod
    def empty(cls) -> Index:
        """Of no documents."""
        return cls(np.zeros(0, np.int64), np.zeros(1, np.int64))

    @property
    def last_number(self) -> int:
        """Of the last document; 0 when there is none."""
        return int(self.numbers_N[-1]) if len(self.numbers_N) else 0

    @property
    def chunks(self) -> int:
        """Of all documents."""
        return int(self.offsets_N1[-1])

    def extended(self, numbers: Sequence[int], chunks: Sequence[int]) -> Index:
        """With more documents, whose numbers go on ascending."""
        added = self.chunks + np.cumsum(np.asarray(chunks, np.int64), dtype=np.int64)
        return Index(
            np.concatenate([self.numbers_N, np.asarray(numbers, np.int64)]),
            np.concatenate([self.offsets_N1, added]),
        )

    def until(self, number: int) -> Index:
        """Without documents above `number`."""
        if number >= self.last_number:
            return self
        count = int(np.searchsorted(self.numbers_N, number, side="right"))
        return Index(self.numbers_N[:count], self.offsets_N1[: count + 1])

    def check_integrity(self) -> None:
        """Raises AssertionError when numbers or offsets are out of order."""
        assert len(self.offsets_N1) == len(self.numbers_N) + 1
        assert self.offsets_N1[0] == 0
        assert (np.diff(self.numbers_N) > 0).all()
        assert (np.diff(self.offsets_N1) > 0).all()


@dataclass(frozen=True, eq=False)
class Segment:
    """Routing keys of the chunks from `first` on; the stack's capacity is the segment's.

    exact_LCE: the same in RAM in the layout's own type, where the stack is coarse. spans: of
    its documents by their number, the last that was asked for.
    """

    first: int
    keys: KeyStack
    exact_LCE: torch.Tensor | None
    spans: dict[int, Spans] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Chunks it has room for."""
        return int(self.keys.values_LCE.shape[1])

    def tensors(self) -> list[torch.Tensor]:
        """Everything that holds keys."""
        held = (self.keys.values_LCE, self.keys.scale_LCS, self.exact_LCE)
        return [tensor for tensor in held if tensor is not None]

    def slabs(
        self, layer: int, index: Index, stop: int, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first chunk, keys [c, E]) up to chunk `stop`, as floats, cut between documents."""
        if self.keys.scale_LCS is None:
            yield self.first, self.keys.values_LCE[layer, : stop - self.first]
            return
        start = self.first
        while start < stop:
            document = int(np.searchsorted(index.offsets_N1, start + _SLAB_CHUNKS, side="right"))
            after = int(np.searchsorted(index.offsets_N1, start, side="right"))
            end = min(int(index.offsets_N1[max(document - 1, after)]), stop)
            low, high = start - self.first, end - self.first
            if self.exact_LCE is not None:
                yield start, self.exact_LCE[layer, low:high].to(device)
            else:
                yield start, self.keys.layer(layer, low, high).dequantised()
            start = end

    def part(self, index: Index, stop: int) -> Part:
        """Its documents up to chunk `stop`, as kernels read them."""
        first, last = np.searchsorted(index.offsets_N1, (self.first, stop))
        documents = len(index.numbers_N)
        spans = self.spans.get(int(last))
        if spans is None:
            offsets_n1 = index.offsets_N1[first : last + 1] - self.first
            device = self.keys.values_LCE.device
            spans = Spans.of(offsets_n1, device, int(first), documents)
            self.spans.clear()
            self.spans[int(last)] = spans
        elif spans.documents != documents:
            spans = replace(spans, documents=documents)
        return Part(self.first, spans, self.keys, self.exact_LCE)


class RoutingTable:
    """Routing keys of the first documents of one memory, on the device.

    Held in segments [L, capacity, E], each half as large as all before it: a
    memory that is appended to is never copied, and has few segments. Rows in use
    are never written again, so a reader of a prefix needs no copy and no lock.
    """

    def __init__(
        self,
        layout: KVLayout,
        device: torch.device,
        storing: KeyStorage | None = None,
        staging: Staging | None = None,
    ) -> None:
        """storing: other than the layout's own type, for kernels. staging: by which keys go to
        the device; what is appended is there after `settle`."""
        self._staging = staging
        self._layout = layout
        self._device = device
        self._storing = storing or KeyStorage()
        self.index = Index.empty()
        self.segments: tuple[Segment, ...] = ()
        #: What was read of these segments last: whoever reads the same shares a pass's work.
        self._read: tuple[tuple[Segment, ...], ResidentKeys] | None = None

    @property
    def bytes(self) -> int:
        """Of all segments on the device, unused rows included."""
        return sum(segment.keys.nbytes for segment in self.segments)

    @property
    def room(self) -> int:
        """Chunks that fit without another segment."""
        if not self.segments:
            return 0
        last = self.segments[-1]
        return last.capacity - (self.index.chunks - last.first)

    def bytes_for(self, chunks: int) -> int:
        """Of a segment with room for `chunks`."""
        layout = self._layout
        item = TORCH_DTYPE[layout.dtype].itemsize
        per_chunk = self._storing.chunk_bytes(layout.width, item)
        return len(layout.routed_layers) * chunks * per_chunk

    def comfortable(self, chunks: int) -> int:
        """Chunks that a new segment should have room for when `chunks` are to be added."""
        return max(chunks, self.index.chunks // 2, _FEWEST_CHUNKS)

    def add_segment(self, capacity: int) -> None:
        """Makes room for `capacity` chunks more; what the last one had left is given up."""
        shape = (len(self._layout.routed_layers), capacity, self._layout.width)
        dtype = TORCH_DTYPE[self._layout.dtype]
        keys = self._storing.empty(shape, dtype, self._device)
        exact_LCE = torch.empty(shape, dtype=dtype) if self._storing.exact else None
        self.segments += (Segment(self.index.chunks, keys, exact_LCE),)

    def append(self, numbers: Sequence[int], chunks: Sequence[int], keys_LCE: torch.Tensor) -> None:
        """Adds documents with ascending numbers; there must be room."""
        count = int(keys_LCE.shape[1])
        assert sum(chunks) == count <= self.room
        last = self.segments[-1]
        start = self.index.chunks - last.first
        stop = start + count
        if last.keys.scale_LCS is None:
            self._bring(last.keys.values_LCE[:, start:stop], keys_LCE)
        else:
            there_LCE = torch.empty_like(keys_LCE, device=self._device)
            self._bring(there_LCE, keys_LCE)
            self.settle()
            made = self._storing.stack(there_LCE)
            assert made.scale_LCS is not None
            copy_into(last.keys.values_LCE[:, start:stop], made.values_LCE)
            copy_into(last.keys.scale_LCS[:, start:stop], made.scale_LCS)
        if last.exact_LCE is not None:
            copy_into(last.exact_LCE[:, start:stop], keys_LCE)
        self.index = self.index.extended(numbers, chunks)

    def settle(self) -> None:
        """Waits until what was appended is on the device."""
        if self._staging is not None:
            self._staging.finish()

    def _bring(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._staging is not None:
            self._staging.copy(target, source)
        else:
            copy_into(target, source)

    def resident(self, index: Index) -> ResidentKeys | None:
        """What kernels read of a prefix of the documents; None for no document. The same object
        for who asks for the same prefix again."""
        ends_N = index.offsets_N1[1:]
        read, known = self._read or ((), None)
        if known is not None and read is self.segments and np.array_equal(known.ends_N, ends_N):
            return known
        parts = []
        for position, segment in enumerate(self.segments):
            last = position + 1 == len(self.segments)
            stop = index.chunks if last else min(index.chunks, self.segments[position + 1].first)
            if stop > segment.first:
                parts.append(segment.part(index, stop))
        offsets_N1 = index.offsets_N1
        if not parts:
            return None
        made = ResidentKeys(offsets_N1[:-1], offsets_N1[1:], tuple(parts))
        self._read = (self.segments, made)
        return made

    def wipe(self) -> None:
        """Overwrites everything with zeros and lets go of it. Nobody may be reading."""
        for segment in self.segments:
            for tensor in segment.tensors():
                wipe(tensor)
        self.segments, self._read = (), None
        self.index = Index.empty()

    def check_integrity(self) -> None:
        """Raises AssertionError when index and segments do not fit."""
        self.index.check_integrity()
        firsts = [segment.first for segment in self.segments]
        ends = [*firsts[1:], self.index.chunks]
        for segment, end in zip(self.segments, ends, strict=False):
            assert 0 < end - segment.first <= segment.capacity
        assert firsts[:1] in ([], [0]) and self.room >= 0


@dataclass(frozen=True)
class MemoryKey:
    """Names a memory in the worker. Both uids are 32 hex digits."""

    tenant: str
    memory: str

    def within(self, tenant: str, memory: str = "") -> bool:
        """Whether it is that memory, or with an empty name any of the tenant, or of all."""
        return tenant in ("", self.tenant) and memory in ("", self.memory)


@dataclass(eq=False)
class HeldMemory:
    """What is held of one memory. `full` is its index, `table` the resident part of it."""

    key: MemoryKey
    epoch: int
    table: RoutingTable
    full: Index = field(default_factory=Index.empty)
    reserved: int = 0
    pins: int = 0
    loading: threading.Lock = field(default_factory=threading.Lock)
