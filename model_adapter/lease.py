"""A memory as the engine reads it: pinned, a snapshot, within one tenant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.carrying import Carrier
from model_adapter.content import HeldContent
from model_adapter.engine import EngineError
from model_adapter.errors import CorruptRecordError, MemoryChangedError, UnwantedError
from model_adapter.fetching import Fetcher, Selection
from model_adapter.msa.kernels import ResidentKeys
from model_adapter.residency import HeldMemory
from model_adapter.superseding import Statement, statement_of
from storage.filters import DocumentFilter

if TYPE_CHECKING:  # The pager makes leases.
    from model_adapter.pager import Pager


class Lease:
    """A pinned memory: the engine's MemoryView. Must be released, once, by its owner.

    Used by one thread at a time. unwanted: asked before every slab that is read from the store;
    when it says True, UnwantedError is raised.
    """

    def __init__(
        self,
        pager: Pager,
        memory: HeldMemory,
        last_number: int,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pager = pager
        self._unwanted = unwanted
        self._memory = memory
        self._last_number = last_number
        self._index = memory.full.until(last_number)
        self._segments = memory.table.segments
        self._resident = memory.table.index.until(last_number)
        self._keys: ResidentKeys | None = None
        self._selection: Selection | None = None
        if pager.by_kernels and len(self._resident.numbers_N) == len(self._index.numbers_N):
            self._keys = memory.table.resident(self._index)
        self._released = False

    @property
    def _coarse(self) -> bool:
        """Routing keys on the device are not the exact ones, if those are asked for as content."""
        return bool(self._segments) and self._segments[0].keys.scale_LCS is not None

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        """See MemoryView."""
        return self._index.numbers_N

    @property
    def chunk_offsets_N1(self) -> npt.NDArray[np.int64]:
        """See MemoryView."""
        return self._index.offsets_N1

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See MemoryView. The resident part, a few segments, then slabs from the store."""
        assert not self._released
        for position, segment in enumerate(self._segments):
            last = position + 1 == len(self._segments)
            end = self._resident.chunks if last else self._segments[position + 1].first
            stop = min(end, self._resident.chunks)
            if stop > segment.first:
                yield from segment.slabs(layer, self._resident, stop, self._pager.device)
        yield from self._streamed(layer)

    def resident_keys(self) -> ResidentKeys | None:
        """See ResidentView."""
        assert not self._released
        return self._keys

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See MemoryView. Raises CorruptRecordError and MemoryChangedError."""
        assert not self._released
        if self._selection is not None and self._selection.documents == documents:
            fetched = self._pager.fetch(self._selection, layer)
            if fetched is not None:
                return fetched
        places_n = np.asarray(documents, np.int64)
        firsts_n = self._index.offsets_N1[places_n]
        chunks_n = self._index.offsets_N1[places_n + 1] - firsts_n
        numbers = self._index.numbers_N[places_n].tolist()
        apart_n = (places_n >= len(self._resident.numbers_N)) | self._coarse

        def take(
            held: Sequence[HeldContent], carrier: Carrier, drops: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            found = [content.value_LCE.shape[1] for content in held]
            self._pager.source(self._memory.key).check_same(chunks_n, found)
            fetcher = self._pager.fetcher
            if fetcher is not None and all(content.place is not None for content in held):
                rows = self._rows(fetcher, held, firsts_n, chunks_n)
                self._selection = fetcher.select(list(documents), *rows, held, drops)
                return fetcher(self._selection, layer)
            dtype, ends_n = held[0].value_LCE.dtype, np.cumsum(chunks_n)
            within_R = np.arange(ends_n[-1]) - np.repeat(ends_n - chunks_n, chunks_n)
            chunks_R = np.repeat(firsts_n, chunks_n) + within_R
            values = [content.value_words[layer] for content in held]
            keys = [words[layer] for c in held if (words := c.key_words) is not None]
            if len(keys) == len(held):
                carried_RE, _ = carrier(keys, chunks_R, dtype)
                return carried_RE, carrier(values, chunks_R, dtype)[0]
            begins_S = np.array([segment.first for segment in self._segments])
            segment_R = np.searchsorted(begins_S, chunks_R, side="right") - 1
            values_RE, rows_R = carrier(values, chunks_R - begins_S[segment_R], dtype)
            if not keys:
                return self._table_keys(layer, segment_R, rows_R), values_RE
            mixed = [
                self._resident_keys(layer, int(first), int(first + chunks))
                if content.key_LCE is None
                else content.key_LCE[layer].to(self._pager.device)
                for content, first, chunks in zip(held, firsts_n, chunks_n, strict=True)
            ]
            return torch.cat(mixed), values_RE

        try:
            wanted = list(zip(numbers, apart_n.tolist(), strict=True))
            return self._pager.content(self._memory, wanted, take)
        except EngineError:
            self._pager.discard(self._memory)
            raise

    def text(self, number: int) -> str:
        """See MemoryView. Raises CorruptRecordError."""
        assert not self._released
        if number > self._last_number:
            raise KeyError(number)
        return self._pager.source(self._memory.key).text(number)

    def words(
        self,
        question: str,
        limit: int,
        unwanted: Callable[[], bool] = lambda: False,
        among: npt.NDArray[np.int64] | None = None,
    ) -> dict[int, float] | None:
        """BM25 by number of the best documents of this snapshot that share a word with the
        question; None when there is no room for an index. See Pager.lease for unwanted.

        among: numbers of the documents that count, as if there were no others; None for all.
        """
        assert not self._released
        ask = self._pager.derived.words
        return ask(self._memory, self._index, question, limit, unwanted=unwanted, among=among)

    def statements(self, numbers: Sequence[int]) -> dict[int, Statement]:
        """What documents say, and when; one that is gone, or damaged, is missing."""
        assert not self._released
        source, found = self._pager.source(self._memory.key), dict[int, Statement]()
        for number in numbers:
            with suppress(KeyError, CorruptRecordError, MemoryChangedError):
                found[number] = statement_of(source.document(number))
        return found

    def matching(
        self, wanted: DocumentFilter, unwanted: Callable[[], bool] = lambda: False
    ) -> npt.NDArray[np.bool_]:
        """[N]: which documents of this snapshot match. See Pager.lease for unwanted."""
        assert not self._released
        return self._pager.derived.matching(self._memory, self._index, wanted, unwanted)

    def release(self) -> None:
        """Unpins the memory. Tensors it lent may be overwritten from now on."""
        if not self._released:
            self._released, self._selection = True, None
            self._pager.release(self._memory)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _streamed(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        index, position = self._index, len(self._resident.numbers_N)
        if position == len(index.numbers_N):
            return
        source = self._pager.source(self._memory.key)
        try:
            for slab in source.slabs(int(index.numbers_N[position]), index.last_number):
                if self._unwanted():
                    raise UnwantedError("the caller went away while the memory was read through")
                end = position + len(slab.numbers)
                chunks = np.diff(index.offsets_N1[position : end + 1])
                source.check_same(index.numbers_N[position:end], slab.numbers)
                source.check_same(chunks, slab.chunks)
                keys_CE = slab.keys_LCE[layer].to(self._pager.device)
                yield int(index.offsets_N1[position]), keys_CE
                position = end
            source.check_same(index.numbers_N[position:], [])
        except UnwantedError:
            raise
        except EngineError:
            self._pager.discard(self._memory)
            raise

    def _rows(
        self,
        fetcher: Fetcher,
        held: Sequence[HeldContent],
        firsts_n: npt.NDArray[np.int64],
        chunks_n: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the keys of these documents lie, and their values. firsts_n: their first chunks."""
        keys_n, values_n = np.array([content.addresses for content in held], np.int64).T
        steps_n = chunks_n * fetcher.row_bytes
        if self._segments and not keys_n.all():
            tables = [segment.keys.values_LCE for segment in self._segments]
            bases_S = np.array([table.data_ptr() for table in tables])
            steps_S = np.array([table.stride(0) * table.element_size() for table in tables])
            begins_S = np.array([segment.first for segment in self._segments])
            at_n = np.searchsorted(begins_S, firsts_n, side="right") - 1
            there_n = bases_S[at_n] + (firsts_n - begins_S[at_n]) * fetcher.row_bytes
            steps_n = np.where(keys_n == 0, steps_S[at_n], steps_n)
            keys_n = np.where(keys_n == 0, there_n, keys_n)
        return fetcher.rows(keys_n, chunks_n, steps_n), fetcher.rows(values_n, chunks_n)

    def _table_keys(
        self, layer: int, segment_R: npt.NDArray[np.int64], rows_R: torch.Tensor
    ) -> torch.Tensor:
        """Keys [R, E] of these rows of segments, of the table in one step a run in one segment."""
        cuts = [0, *(np.flatnonzero(np.diff(segment_R)) + 1).tolist(), len(segment_R)]
        runs = [
            self._segments[segment_R[first]]
            .keys.values_LCE[layer]
            .index_select(0, rows_R[first:end])
            for first, end in pairwise(cuts)
        ]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def _resident_keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        segment = next(s for s in reversed(self._segments) if s.first <= first)
        return segment.keys.values_LCE[layer, first - segment.first : end - segment.first]
