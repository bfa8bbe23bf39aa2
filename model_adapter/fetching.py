"""Content of chosen documents to the device, read by a kernel where it lies.

One launch brings a layer's keys and values of all documents: keys from the device's table or from
a pool of pinned memory, values from the pool. Where a second layer asks for the same documents,
the launch brings what the next layers need of them as well: layers that choose together all ask
for the same, and find it there. A layer that asks for others is given those.
Shape suffixes as in `storage.layout`; n documents, R rows of them, each a key or a value.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.content import Fence, HeldContent
from model_adapter.msa.kernels.launches import Launch
from model_adapter.msa.kernels.score import fused_available
from model_adapter.tensors import TORCH_DTYPE
from storage.layout import KVLayout

log = logging.getLogger(__name__)

_WORD_BYTES = 8
#: Programs of a launch, and 64-bit words that one moves at a time, at most.
_PROGRAMS, _MOST_WORDS = 256, 512
#: Brought ahead at most, for one lease.
_AHEAD_BYTES = 4 * 2**20

_Numbers = npt.NDArray[np.int64]
_Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class Selection:
    """Where the rows of some documents lie, keys before values: int64 [2 R, 2] on the device.

    documents: positions. drops: of the cache when this was made; another one has since dropped
    something. fence: behind the last launch.
    """

    documents: Sequence[int]
    table_R2: torch.Tensor
    held: Sequence[HeldContent]
    drops: int
    fence: Fence | None = None
    asked: bool = False
    ahead: dict[int, _Pair] = field(default_factory=dict)


class Fetcher:
    """Used by one thread at a time."""

    def __init__(self, device: torch.device, layout: KVLayout) -> None:
        """Raises ValueError for rows that are not whole 64-bit words."""
        self._device = device
        self._pinned = device.type == "cuda"
        self._dtype = TORCH_DTYPE[layout.dtype]
        self.row_bytes = layout.width * self._dtype.itemsize
        if self.row_bytes % _WORD_BYTES:
            raise ValueError(f"rows of {self.row_bytes} bytes are not whole 64-bit words")
        self._words = self.row_bytes // _WORD_BYTES
        self._layers = len(layout.routed_layers)

    @classmethod
    def of(cls, device: torch.device, layout: KVLayout) -> Fetcher | None:
        """None where content is to be carried: on a CPU, or where the kernel does not work."""
        if not fused_available(device):
            return None
        try:
            fetcher = cls(device, layout)
            fetcher.check()
        except Exception as error:  # noqa: BLE001  # a compiler's or driver's own; carrying goes on
            log.warning("content is not fetched by a kernel: %s: %s", type(error).__name__, error)
            return None
        return fetcher

    def memory(self, size: int) -> torch.Tensor:
        """Zeros, uint8, that the kernel can read."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self._pinned)

    def check(self) -> None:
        """Raises unless a fetch brings what there is."""
        rows, layers = 5, self._layers
        memory = self.memory(layers * rows * self.row_bytes)
        memory.random_()
        held = HeldContent(None, memory.view(layers, rows, -1))
        rows_R2 = self.rows(np.array([held.addresses[1]]), np.array([rows]))
        made = self.select([0], rows_R2, rows_R2, [held], 0)
        alone = [self.bring(made, layer, 1)[0] for layer in range(layers)]
        for brought in (alone, self.bring(made, 0, layers)):
            for pair, expected in zip(brought, held.value_LCE, strict=True):
                if any(not torch.equal(found.cpu().view(torch.uint8), expected) for found in pair):
                    raise RuntimeError("a fetch brought other bytes")

    def rows(
        self, addresses_n: _Numbers, chunks_n: _Numbers, steps_n: _Numbers | None = None
    ) -> _Numbers:
        """[R, 2] for a Selection. addresses_n: of the documents' first rows in layer 0.

        steps_n: bytes from one layer of a document to its next; None: it lies alone, [L, C, E].
        """
        ends_n = np.cumsum(chunks_n)
        within_R = np.arange(ends_n[-1]) - np.repeat(ends_n - chunks_n, chunks_n)
        steps_n = chunks_n * self.row_bytes if steps_n is None else steps_n
        first_R = np.repeat(addresses_n, chunks_n) + within_R * self.row_bytes
        return np.stack([first_R, np.repeat(steps_n, chunks_n)], axis=1)

    def select(
        self,
        documents: Sequence[int],
        keys_R2: _Numbers,
        values_R2: _Numbers,
        held: Sequence[HeldContent],
        drops: int,
    ) -> Selection:
        """held: what is read in the pool. See `rows` and Selection."""
        table_R2 = torch.from_numpy(np.concatenate([keys_R2, values_R2]))
        if not self._pinned:
            return Selection(documents, table_R2, held, drops)
        # Pinned by torch's own cache, which keeps it until it has been copied.
        there_R2 = table_R2.pin_memory().to(self._device, non_blocking=True)
        fence = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped
        return Selection(documents, there_R2, held, drops, fence)

    def __call__(self, selection: Selection, layer: int) -> _Pair:
        """Keys and values [R, E] of a layer, on the device; nobody waits for them."""
        ready = selection.ahead.pop(layer, None)
        if ready is not None:
            return ready
        layers = 1
        if selection.asked:
            fitting = _AHEAD_BYTES // (len(selection.table_R2) * self.row_bytes)
            layers = max(1, min(self._layers - layer, fitting))
        selection.asked = True
        brought = self.bring(selection, layer, layers)
        selection.ahead = {layer + n: pair for n, pair in enumerate(brought)}
        return selection.ahead.pop(layer)

    def bring(self, selection: Selection, layer: int, layers: int) -> list[_Pair]:
        """Keys and values of so many layers from `layer` on."""
        rows = len(selection.table_R2)
        size = layers * rows, self._words
        out = torch.empty(size, dtype=torch.int64, device=self._device)
        launch = _launch(out.get_device(), self._words)
        launch((selection.table_R2, out), rows, layer, layers)
        if isinstance(selection.fence, torch.cuda.Event):
            selection.fence.record()
            for content in selection.held:
                content.fence = selection.fence
        parts = out.view(self._dtype).view(2 * layers, rows // 2, -1).unbind()
        return list(zip(parts[::2], parts[1::2], strict=True))


@lru_cache(maxsize=64)
def _launch(device: int, words: int) -> Launch:
    """device: what is compiled is loaded there."""
    from model_adapter.msa.kernels import fused_fetch  # noqa: PLC0415  # triton is optional

    block = min(_MOST_WORDS, 1 << (words - 1).bit_length())
    constants = {"WORDS": words, "BLOCK": block}
    return Launch(fused_fetch.fetch_rows, (_PROGRAMS, 1, 1), constants, num_warps=4)
