"""A rank's view of a memory that several ranks hold together; see kernels/sharding.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.engine import EngineError, MemoryView
from model_adapter.msa.kernels import ResidentKeys, Shard
from model_adapter.msa.kernels.sharding import gather_rows


class ShardView:
    """MemoryView of the whole memory; `content` and whatever routes are calls of all ranks."""

    def __init__(
        self,
        part: MemoryView,
        resident: ResidentKeys,
        shard: Shard,
        numbers_N: npt.NDArray[np.int64],
        offsets_N1: npt.NDArray[np.int64],
    ) -> None:
        """part, resident: of the rank's own documents, by their positions among these.
        numbers_N, offsets_N1: of the whole memory."""
        self._part, self._shard = part, shard
        self._resident = replace(resident, shard=shard)
        self._numbers_N, self._offsets_N1 = numbers_N, offsets_N1

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        """See MemoryView."""
        return self._numbers_N

    @property
    def chunk_offsets_N1(self) -> npt.NDArray[np.int64]:
        """See MemoryView."""
        return self._offsets_N1

    def resident_keys(self) -> ResidentKeys:
        """See ResidentView: the rank's own, with its shard."""
        return self._resident

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Raises EngineError: only kernels route over ranks."""
        raise EngineError("a memory over several devices is routed by kernels alone")

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See MemoryView. Every rank gives what it has of them, and all get all of it."""
        first, stop = self._shard.own
        counts = np.diff(self._offsets_N1)[list(documents)]
        begins = np.cumsum(counts) - counts
        mine = [place for place, n in enumerate(documents) if first <= n < stop]
        # A rank that has none of them still says what kind of rows there are.
        keys_cE, values_cE = self._part.content(
            layer, [documents[place] - first for place in mine] or [0]
        )
        if not mine:
            keys_cE, values_cE = keys_cE[:0], values_cE[:0]
        places = [np.arange(begins[place], begins[place] + counts[place]) for place in mine]
        rows = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
        both_cX = torch.cat((keys_cE, values_cE), dim=1)
        index = torch.from_numpy(rows).to(both_cX.device)
        all_cX = gather_rows(both_cX, index, int(counts.sum()))
        width = keys_cE.shape[1]
        return all_cX[:, :width], all_cX[:, width:]

    def text(self, number: int) -> str:
        """See MemoryView; texts are not sharded."""
        return self._part.text(number)
