"""Keys and values of all rows in one tensor per layer, so that one call attends for all rows.

A row holds one span of every layer's tensor, with room to grow; what outgrows its span
moves to one half as large again, so appending copies, amortised, no more than it adds.
Shape suffixes are those of model.py; S positions of all rows.
"""

from __future__ import annotations

import threading
import weakref
from bisect import insort
from collections import deque
from dataclasses import dataclass

import torch

from model_adapter.msa.config import ModelConfig
from model_adapter.msa.kvcache import HEADROOM, Held, KVCache

#: Positions of a layer at first.
FIRST_POSITIONS = 4096
#: Position that belongs to no row: rows that only fill up a batch write there.
NOBODYS = 0


@dataclass
class Span:
    """A row's positions in one layer: `length` of `room` are in use."""

    start: int = 0
    room: int = 0
    length: int = 0


class FreeRuns:
    """Runs of positions that are free, by where they begin."""

    def __init__(self, first: int, stop: int) -> None:
        self._runs = [(first, stop)]

    def take(self, size: int) -> int | None:
        """The first run's beginning that has room, or None."""
        for place, (first, stop) in enumerate(self._runs):
            if stop - first >= size:
                self._runs[place : place + 1] = (
                    [(first + size, stop)] if stop - first > size else []
                )
                return first
        return None

    def give(self, first: int, stop: int) -> None:
        """Positions are free again."""
        insort(self._runs, (first, stop))
        joined = [self._runs[0]]
        for run in self._runs[1:]:
            if run[0] == joined[-1][1]:
                joined[-1] = (joined[-1][0], run[1])
            else:
                joined.append(run)
        self._runs = joined

    @property
    def free(self) -> int:
        """Positions in all runs."""
        return sum(stop - first for first, stop in self._runs)


class KVPool:
    """All layers. Used from one thread, but for `release` and `settle`."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        positions: int = FIRST_POSITIONS,
    ) -> None:
        shape = (2, positions, config.num_kv_heads, config.head_dim)
        #: [2, S, K, D] of every layer: keys, values.
        # Plain tensors, also under inference mode: rows begin outside of it.
        with torch.inference_mode(mode=False):
            self.layers = [
                torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]
        #: Changes whenever a layer's tensor is another one.
        self.generation = 0
        self._free = [FreeRuns(NOBODYS + 1, positions) for _ in range(config.num_layers)]
        self._released: deque[list[Span]] = deque()
        #: Held while positions change hands, and by who must not be disturbed meanwhile.
        self.lock = threading.RLock()

    def release(self, spans: list[Span]) -> None:
        """A row is gone; from any thread. Its positions are zeroed before anyone gets them."""
        self._released.append(spans)

    def settle(self) -> None:
        """Returns when nothing is left of rows that are gone; from any thread."""
        with self.lock:
            self._collect()
        device = self.layers[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def reserve(self, layer: int, span: Span, count: int) -> int:
        """Adds positions to a span, which may move; the slot of the first one."""
        if span.length + count > span.room:
            with self.lock:
                self._move(layer, span, span.length + count)
        first = span.start + span.length
        span.length += count
        return first

    def free(self, layer: int) -> int:
        """Positions that nobody has."""
        with self.lock:
            self._collect()
            return self._free[layer].free

    def _move(self, layer: int, span: Span, needed: int) -> None:
        room = max(needed + HEADROOM, span.room * 3 // 2)
        start, old = self._take(layer, room), (span.start, span.start + span.length)
        store = self.layers[layer]
        if span.length:
            store[:, start : start + span.length] = store[:, old[0] : old[1]].clone()
            store[:, old[0] : old[1]] = 0
        if span.room:
            self._free[layer].give(span.start, span.start + span.room)
        span.start, span.room = start, room

    def _take(self, layer: int, size: int) -> int:
        self._collect()
        start = self._free[layer].take(size)
        if start is None:
            held = self.layers[layer].shape[1]
            self._grow(layer, max(2 * held, held + size))
            start = self._free[layer].take(size)
        assert start is not None
        return start

    def _grow(self, layer: int, positions: int) -> None:
        store = self.layers[layer]
        with torch.inference_mode(mode=False):
            grown = store.new_zeros((2, positions, *store.shape[2:]))
        grown[:, : store.shape[1]] = store
        self.layers[layer] = grown
        self._free[layer].give(store.shape[1], positions)
        self.generation += 1

    def _collect(self) -> None:
        left: list[torch.Tensor] = []
        while self._released:
            for layer, span in enumerate(self._released.popleft()):
                if span.room:
                    left += self.layers[layer][:, span.start : span.start + span.length]
                    self._free[layer].give(span.start, span.start + span.room)
        if left:
            # A launch for many spans, not one for each.
            torch._foreach_zero_(left)


class PooledCache:
    """A row's cache in a pool; what KVCache is, elsewhere."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.spans = [Span() for _ in pool.layers]
        weakref.finalize(self, pool.release, self.spans)

    def length(self, layer: int) -> int:
        """Positions held in a layer."""
        return self.spans[layer].length

    def append(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Adds positions at the end."""
        room_K, room_V = self._more(layer, k_TKD.shape[0])
        room_K.copy_(k_TKD)
        room_V.copy_(v_TKD)

    def begin(self, prefix: Held) -> None:
        """Adds a copy of another row to this one, all layers in few launches."""
        rooms, held = list[torch.Tensor](), list[torch.Tensor]()
        for layer in range(len(self.spans)):
            keys_KSD, values_KSD = prefix.read(layer)
            rooms += self._more(layer, keys_KSD.shape[1])
            held += (keys_KSD.transpose(0, 1), values_KSD.transpose(0, 1))
        torch._foreach_copy_(rooms, held)

    def _more(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where so many positions more go: views [count, K, D] of keys and values."""
        first = self.pool.reserve(layer, self.spans[layer], count)
        keys_TKD, values_TKD = self.pool.layers[layer][:, first : first + count]
        return keys_TKD, values_TKD

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, S, D] as views, valid until the next append of any row."""
        span, store = self.spans[layer], self.pool.layers[layer]
        held = store[:, span.start : span.start + span.length].transpose(1, 2)
        return held[0], held[1]


Cache = KVCache | PooledCache
