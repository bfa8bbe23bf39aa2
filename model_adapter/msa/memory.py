"""A memory held in RAM: the MemoryView of tests, parity runs and small tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.engine import ModelMismatchError
from model_adapter.msa.encode import from_bits
from model_adapter.msa.kernels import KeyStorage, ResidentKeys
from storage.layout import KVBlock, KVLayout, LayoutError


class InMemoryView:
    """Blocks and texts of one memory. slab_chunks bounds a routing slab, 0 for one slab."""

    def __init__(
        self,
        layout: KVLayout,
        blocks: Sequence[KVBlock],
        texts: Mapping[int, str],
        slab_chunks: int = 0,
        *,
        storing: KeyStorage | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    ) -> None:
        """storing: how kernels find the routing keys on the device; None: not at all.

        Raises ModelMismatchError for a block of another layout.
        """
        blocks = sorted(blocks, key=lambda block: block.number)
        for block in blocks:
            try:
                block.validate(layout)
            except LayoutError as error:
                raise ModelMismatchError(str(error)) from error
        self._texts = dict(texts)
        self._slab_chunks = slab_chunks
        self._numbers_N = np.array([block.number for block in blocks], dtype=np.int64)
        counts = [block.routing_key_LCE.shape[1] for block in blocks]
        self._offsets_N1 = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self._routing_LCE = _join([block.routing_key_LCE for block in blocks], layout)
        self._value_LCE = _join([block.value_LCE for block in blocks], layout)
        self._key_LCE = self._routing_LCE
        if layout.separate_routing_keys:
            keys = [block.key_LCE for block in blocks if block.key_LCE is not None]
            self._key_LCE = _join(keys, layout)
        self._resident = None
        if storing is not None and len(self._numbers_N):
            self._resident = ResidentKeys.of(self._offsets_N1, self._routing_LCE, storing, device)
        #: Documents whose content was read, for tests of "unselected is never read".
        self.content_read: set[int] = set()

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        """Document numbers, ascending."""
        return self._numbers_N

    @property
    def chunk_offsets_N1(self) -> npt.NDArray[np.int64]:
        """Document n owns chunks [offsets[n], offsets[n + 1])."""
        return self._offsets_N1

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first chunk, keys [c, E]) slabs cut at document boundaries."""
        total = int(self._offsets_N1[-1])
        if not self._slab_chunks:
            if total:
                yield 0, self._routing_LCE[layer]
            return
        first = document = 0
        while first < total:
            document += 1
            while (
                document + 1 < len(self._offsets_N1)
                and self._offsets_N1[document + 1] - first <= self._slab_chunks
            ):
                document += 1
            stop = int(self._offsets_N1[document])
            yield first, self._routing_LCE[layer, first:stop]
            first = stop

    def resident_keys(self) -> ResidentKeys | None:
        """See ResidentView."""
        return self._resident

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [c, E] of the documents at these positions, in order."""
        self.content_read.update(documents)
        offsets = self._offsets_N1
        spans = [(int(offsets[n]), int(offsets[n + 1])) for n in documents]
        keys = [self._key_LCE[layer, first:stop] for first, stop in spans]
        values = [self._value_LCE[layer, first:stop] for first, stop in spans]
        return torch.cat(keys), torch.cat(values)

    def text(self, number: int) -> str:
        """Raises KeyError for an unknown number."""
        return self._texts[number]


def _join(arrays: Sequence[npt.NDArray[np.generic]], layout: KVLayout) -> torch.Tensor:
    if not arrays:
        dtype = torch.bfloat16 if layout.dtype == "bf16" else torch.float32
        return torch.empty(len(layout.routed_layers), 0, layout.width, dtype=dtype)
    return from_bits(np.concatenate(arrays, axis=1))
