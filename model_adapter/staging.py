"""Host memory to a device through a ring of pinned buffers, on a stream of its own.

A caller hands over tensors as it has decoded them and goes on decoding the next while they
are under way. Nothing waits for the device but a buffer that is to be filled again, and
`finish`. Pinned memory is bounded by the ring.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from model_adapter.tensors import copy_into

#: Waits until a copy has arrived.
Arrival = Callable[[], None]


class Lane(Protocol):
    """What moves a buffer's content to the device."""

    def buffer(self, size: int) -> torch.Tensor:
        """uint8 [size] in host memory, as the lane wants it."""

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Begins to copy; source is left alone until it has arrived."""


class CudaLane:
    """Pinned buffers, asynchronous copies on a stream of the lane's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped

    def buffer(self, size: int) -> torch.Tensor:
        """See Lane."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """See Lane. target's rows [L, ...] are contiguous one by one: no copy on the way."""
        # The memory may have been another tensor's, with work on it still queued.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for own, given in zip(target, source, strict=True):
                own.copy_(given, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped
            arrived.record(self._stream)

        def wait() -> None:
            arrived.synchronize()

        return wait


class Staging:
    """Thread-safe. buffer_bytes: of each of the ring's buffers."""

    def __init__(self, lane: Lane, buffer_bytes: int, buffers: int = 3) -> None:
        self._lane = lane
        self._bytes = buffer_bytes
        self._lock = threading.Lock()
        self._ring: deque[tuple[torch.Tensor, Arrival | None]] = deque(
            (torch.empty(0, dtype=torch.uint8), None) for _ in range(buffers)
        )

    def copy(self, target_LCX: torch.Tensor, source_LCX: torch.Tensor) -> None:
        """Begins to copy, all chunks [:, c] that fit a buffer at a time. source may be
        changed when this returns; target holds it after `finish`."""
        per_chunk = source_LCX[:, :1].nbytes
        step = max(1, self._bytes // per_chunk)
        for first in range(0, source_LCX.shape[1], step):
            part = source_LCX[:, first : first + step]
            self._send(target_LCX[:, first : first + step], part)

    def finish(self) -> None:
        """Waits until everything handed over has arrived."""
        with self._lock:
            for _ in range(len(self._ring)):
                self._next()

    def _send(self, target: torch.Tensor, part: torch.Tensor) -> None:
        with self._lock:
            buffer = self._next(max(part.nbytes, self._bytes))
            staged = buffer[: part.nbytes].view(part.dtype).view(part.shape)
            copy_into(staged, part)
            self._ring[-1] = (buffer, self._lane.start(target, staged))

    def _next(self, size: int = 0) -> torch.Tensor:
        """The buffer that was sent longest ago, once it has arrived; last in the ring now."""
        buffer, arrival = self._ring.popleft()
        if arrival is not None:
            arrival()
        if buffer.nbytes < size:
            buffer = self._lane.buffer(size)
        self._ring.append((buffer, None))
        return buffer
