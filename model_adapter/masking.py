"""A memory as if it held some of its documents and no others: those that a filter chooses, and
that are not deleted.

The mask lies in front of routing, not behind it. Routing, the top k of every layer, the
standardising of scores and what the model may name see the documents that match alone,
so that a filtered answer is the answer of a memory that never held the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.engine import MemoryView, ResidentView
from model_adapter.msa.kernels import ResidentKeys

#: Chunks gathered at a time: a copy of scattered keys never grows with the memory.
_GATHERED_CHUNKS = 65_536


class MaskedView:
    """MemoryView of the documents of `memory` that the mask [N] keeps.

    Runs of kept documents are lent as they lie; scattered ones are copied together, piece by
    piece.
    """

    def __init__(self, memory: MemoryView, keep_N: npt.NDArray[np.bool_]) -> None:
        self._memory = memory
        offsets_N1 = memory.chunk_offsets_N1
        self._positions_n = np.flatnonzero(keep_N)
        self._numbers_n = memory.numbers_N[self._positions_n]
        #: First chunk of each kept document within `memory`, and the first behind it.
        self._firsts_n = offsets_N1[self._positions_n]
        self._ends_n = offsets_N1[self._positions_n + 1]
        chunks_n = self._ends_n - self._firsts_n
        self._offsets_n1 = np.concatenate(([0], np.cumsum(chunks_n, dtype=np.int64)))
        self._keys: ResidentKeys | None = None
        if len(self._numbers_n) and isinstance(memory, ResidentView):
            whole = memory.resident_keys()
            self._keys = None if whole is None else whole.only(self._positions_n)

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        """See MemoryView."""
        return self._numbers_n

    @property
    def chunk_offsets_N1(self) -> npt.NDArray[np.int64]:
        """See MemoryView."""
        return self._offsets_n1

    def resident_keys(self) -> ResidentKeys | None:
        """See ResidentView. Kernels pass over what does not match, and nothing is copied."""
        return self._keys

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See MemoryView."""
        if not len(self._numbers_n):
            return
        for first, keys_CE in self._memory.routing_keys(layer):
            start, end = np.searchsorted(self._firsts_n, (first, first + keys_CE.shape[0]))
            for low, high in self._pieces(int(start), int(end)):
                rows = self._rows(low, high, first, keys_CE)
                yield int(self._offsets_n1[low]), rows

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See MemoryView."""
        return self._memory.content(layer, [int(self._positions_n[n]) for n in documents])

    def text(self, number: int) -> str:
        """See MemoryView. A document that does not match is unknown."""
        place = int(np.searchsorted(self._numbers_n, number))
        if place == len(self._numbers_n) or self._numbers_n[place] != number:
            raise KeyError(number)
        return self._memory.text(number)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Kept documents start..end - 1 in pieces: one for a run, else of bounded size."""
        if start < end and self._is_run(start, end):
            yield start, end
            return
        while start < end:
            most = self._offsets_n1[start] + _GATHERED_CHUNKS
            stop = int(np.searchsorted(self._offsets_n1, most, side="right")) - 1
            stop = min(max(stop, start + 1), end)
            yield start, stop
            start = stop

    def _is_run(self, low: int, high: int) -> bool:
        return bool(self._positions_n[high - 1] - self._positions_n[low] == high - 1 - low)

    def _rows(self, low: int, high: int, first: int, keys_CE: torch.Tensor) -> torch.Tensor:
        """Keys of kept documents low..high - 1, out of a slab that begins with chunk `first`."""
        if self._is_run(low, high):
            return keys_CE[int(self._firsts_n[low]) - first : int(self._ends_n[high - 1]) - first]
        offsets_n = self._offsets_n1[low:high]
        counts_n = self._ends_n[low:high] - self._firsts_n[low:high]
        shift_n = self._firsts_n[low:high] - first - (offsets_n - offsets_n[0])
        rows = np.repeat(shift_n, counts_n) + np.arange(int(counts_n.sum()))
        return keys_CE.index_select(0, torch.from_numpy(rows).to(keys_CE.device))
