"""Content of chosen documents from host RAM to the device.

The host gathers the rows in one of a few small pinned buffers, and one copy brings them, behind
what the device was given before; nobody waits for it. A kernel that reads the rows where they lie
would save the gathering, but takes longer to be launched than that takes.
Shape suffixes as in `storage.layout`; R rows of all parts, W words of a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.tensors import Words, wipe

#: Buffers that may be under way before one is waited for.
_BUFFERS = 4
#: Of the smallest buffer.
_FEWEST_BYTES = 2**20


class Carrier:
    """Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        nothing = torch.empty(0, dtype=torch.uint8)
        self._ring: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque(
            (nothing, None) for _ in range(_BUFFERS)
        )

    def __call__(
        self, parts: Sequence[Words], places_R: npt.NDArray[np.int64], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts [r, W] behind each other as values [R, E], and the places [R], on the device.

        Both are the caller's again when this returns.
        """
        rows, words = len(places_R), parts[0].shape[1]
        first = 8 * (rows + rows % 2)  # Values begin at a multiple of 16 bytes.
        size = first + 2 * rows * words
        buffer = self._buffer(size)[:size]
        memory = buffer.numpy()
        memory[: 8 * rows].view(np.int64)[:] = places_R
        np.concatenate(parts, out=memory[first:].view(np.int16).reshape(rows, words))
        there = self._sent(buffer)
        return there[first:].view(dtype).view(rows, -1), there[: 8 * rows].view(torch.int64)

    def wipe(self) -> None:
        """Overwrites what the buffers held, once it has been read."""
        for buffer, read in self._ring:
            if read is not None:
                read.synchronize()
            wipe(buffer)

    def _buffer(self, size: int) -> torch.Tensor:
        if not self._pinned:
            return torch.empty(size, dtype=torch.uint8)
        buffer, read = self._ring[0]
        if read is not None:
            read.synchronize()
        if buffer.nbytes < size:
            wipe(buffer)
            room = max(_FEWEST_BYTES, 1 << (size - 1).bit_length())
            buffer = torch.empty(room, dtype=torch.uint8, pin_memory=True)
            self._ring[0] = (buffer, None)
        return buffer

    def _sent(self, buffer: torch.Tensor) -> torch.Tensor:
        """On a CPU the buffer itself, which is a new one."""
        if not self._pinned:
            return buffer
        there = buffer.to(self._device, non_blocking=True)
        read = torch.cuda.current_stream(self._device).record_event()
        whole, _ = self._ring.popleft()
        self._ring.append((whole, read))
        return there
