"""Host memory to a device through a ring of buffers; on a GPU pinned, on a stream of its own.

A caller borrows a buffer, decodes into it, hands it over and decodes into the next while it is
under way. Nothing waits for the device but a buffer that is to be filled again, and `finish`.
What is held beside the device is bounded by the ring, and overwritten by `wipe`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from model_adapter.tensors import copy_into, wipe
from storage.store import Room

#: Waits until a copy has arrived.
Arrival = Callable[[], None]


class Lane(Protocol):
    """What moves a buffer's content to the device."""

    def buffer(self, size: int) -> torch.Tensor:
        """uint8 [size] in host memory, as the lane wants it."""

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Begins to copy; source is left alone until it has arrived."""


class HostLane:
    """To RAM: plain buffers; a copy is done when it has begun."""

    def buffer(self, size: int) -> torch.Tensor:
        """See Lane."""
        return torch.empty(size, dtype=torch.uint8)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """See Lane."""
        copy_into(target, source)
        return lambda: None


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


@dataclass(eq=False)
class _Buffer:
    """memory: uint8, made when it is needed. used: bytes that may hold something.

    arrivals: of the copies out of it that nobody has waited for.
    """

    memory: torch.Tensor
    used: int = 0
    arrivals: deque[Arrival] = field(default_factory=deque)

    def settle(self) -> None:
        """Waits until nothing reads it."""
        while self.arrivals:
            self.arrivals.popleft()()

    def use(self, size: int) -> torch.Tensor:
        """Its first `size` bytes; behind them nothing is left of what it held."""
        if self.used > size:
            wipe(self.memory[size : self.used])
        self.used = size
        return self.memory[:size]


class Staging:
    """Thread-safe. buffer_bytes: of each of the ring's buffers."""

    def __init__(self, lane: Lane, buffer_bytes: int, buffers: int = 3) -> None:
        self._lane = lane
        self._bytes = buffer_bytes
        self._lock = threading.Lock()
        nothing = torch.empty(0, dtype=torch.uint8)
        self._buffers = [_Buffer(nothing) for _ in range(buffers)]
        #: Those not lent, the one sent longest ago first.
        self._ring = deque(self._buffers)
        #: Those that are, by address.
        self._lent: dict[int, _Buffer] = {}

    @contextmanager
    def lent(self) -> Iterator[Room]:
        """Room for one tensor that is to be copied: in a buffer if it fits one and one is free,
        else in new memory. It is the caller's until the with block ends."""
        buffer = self._borrow()

        def room(size: int) -> memoryview:
            if buffer is None or size > self._bytes:
                return torch.empty(size, dtype=torch.uint8).numpy().data
            return buffer.use(size).numpy().data

        try:
            yield room
        finally:
            if buffer is not None:
                with self._lock:
                    del self._lent[buffer.memory.data_ptr()]
                    self._ring.append(buffer)

    def copy(self, target_LCX: torch.Tensor, source_LCX: torch.Tensor) -> None:
        """Begins to copy; target holds source after `finish`.

        What lies in a lent buffer goes from there, and is left alone from now on. All else goes
        through a buffer, all chunks [:, c] that fit one at a time, and may be changed when this
        returns.
        """
        with self._lock:
            lent = self._lent.get(source_LCX.data_ptr())
            if lent is not None:
                lent.arrivals.append(self._lane.start(target_LCX, source_LCX))
                return
        per_chunk = source_LCX[:, :1].nbytes
        step = max(1, self._bytes // per_chunk)
        for first in range(0, source_LCX.shape[1], step):
            part = source_LCX[:, first : first + step]
            self._send(target_LCX[:, first : first + step], part)

    def finish(self) -> None:
        """Waits until everything handed over has arrived."""
        with self._lock:
            for buffer in self._buffers:
                buffer.settle()

    def wipe(self) -> None:
        """Overwrites with zeros what buffers that are not lent still hold."""
        with self._lock:
            for buffer in self._ring:
                buffer.settle()
                buffer.use(0)

    def _borrow(self) -> _Buffer | None:
        """The last one stays: who copies never waits for who decodes."""
        with self._lock:
            if len(self._ring) < 2:
                return None
            buffer = self._next(self._bytes)
            self._lent[buffer.memory.data_ptr()] = buffer
            return buffer

    def _send(self, target: torch.Tensor, part: torch.Tensor) -> None:
        with self._lock:
            buffer = self._next(max(part.nbytes, self._bytes))
            staged = buffer.use(part.nbytes).view(part.dtype).view(part.shape)
            copy_into(staged, part)
            buffer.arrivals.append(self._lane.start(target, staged))
            self._ring.append(buffer)

    def _next(self, size: int) -> _Buffer:
        """The buffer that was sent longest ago, once all has arrived; in the ring no more."""
        buffer = self._ring.popleft()
        buffer.settle()
        if buffer.memory.nbytes < size:
            buffer.use(0)
            buffer.memory = self._lane.buffer(size)
        return buffer
