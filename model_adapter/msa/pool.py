"""Keys and values of all rows in one tensor per layer, so that one call attends for all rows.

A row holds a span of positions, with room to grow: the same one in all layers of a kind, for
layers that route hold what was chosen beside what the others do. What outgrows its span moves to
one half as large again, so appending copies, amortised, no more than it adds. Rows get room, begin
with a copy of another row and are cleared many at a time, in as many launches as one row takes.

Shape suffixes are those of model.py; S positions of all rows, X of them in a list, R rows,
L layers.
"""

from __future__ import annotations

import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.msa.config import ModelConfig
from model_adapter.msa.kvcache import HEADROOM, KVCache
from model_adapter.msa.packed import moved

#: Positions of a layer at first.
FIRST_POSITIONS = 4096
#: Position that belongs to no row: rows that only fill up a batch write there.
NOBODYS = 0

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Spans:
    """A row's positions. start_2, room_2: by kind of layer (plain, routed), the first one and how
    many there are; used_L: of each layer, how many of them hold something."""

    start_2: Numbers
    room_2: Numbers
    used_L: Numbers


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


@dataclass
class _Moves:
    """What a kind's layers copy: (first, count) of where from, and where to."""

    sources: list[tuple[int, int]] = field(default_factory=list)
    targets: list[tuple[int, int]] = field(default_factory=list)
    #: Of the sources those that are nobody's from now on.
    left: list[tuple[int, int]] = field(default_factory=list)


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
        #: Of every layer its kind: 1 where it routes.
        self.kind_L = np.isin(np.arange(config.num_layers), config.msa.routed_layers).astype(int)
        #: Layers of each kind that there is.
        self.kinds = {
            int(kind): np.flatnonzero(self.kind_L == kind) for kind in np.unique(self.kind_L)
        }
        #: Changes whenever a layer's tensor is another one.
        self.generation = 0
        self._free = [FreeRuns(NOBODYS + 1, positions) for _ in range(2)]
        self._released: deque[Spans] = deque()
        #: Held while positions change hands, and by who must not be disturbed meanwhile.
        self.lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Where the layers lie."""
        return self.layers[0].device

    def release(self, spans: Spans) -> None:
        """A row is gone; from any thread. Its positions are zeroed before anyone gets them."""
        self._released.append(spans)

    def settle(self) -> None:
        """Returns when nothing is left of rows that are gone; from any thread."""
        with self.lock:
            self._collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self, layer: int) -> int:
        """Positions that nobody has."""
        with self.lock:
            self._collect()
            return self._free[int(self.kind_L[layer])].free

    def fullest(self, used_RL: Numbers) -> Numbers:
        """[R, 2]: positions that rows have in use in the fullest layer of each kind."""
        most_R2 = np.zeros((len(used_RL), 2), np.int64)
        for kind, layers in self.kinds.items():
            most_R2[:, kind] = used_RL[:, layers].max(axis=1)
        return most_R2

    def make_room(self, rows: Sequence[PooledCache], needed_R2: Numbers) -> None:
        """Gives rows room for so many positions of each kind, where they have less. What they hold,
        or begin with, comes along."""
        room_R2 = np.stack([row.spans.room_2 for row in rows])
        short = np.any(needed_R2 > room_R2, axis=1).tolist()
        moving = [place for place, row in enumerate(rows) if short[place] or row.behind is not None]
        if not moving:
            return
        sources = {id(rows[place].behind) for place in moving}
        assert sources.isdisjoint(id(row) for row in rows), "a row may not move while it is copied"
        with self.lock:
            self._collect()
            moves = {kind: _Moves() for kind in self.kinds}
            for place in moving:
                self._move(rows[place], needed_R2[place], moves)
            for kind, made in moves.items():
                self._carry_out(kind, made)

    def _move(self, row: PooledCache, needed_2: Numbers, moves: dict[int, _Moves]) -> None:
        spans, source, row.behind = row.spans, row.behind, None
        (held_2,) = self.fullest(spans.used_L[None])
        for kind, made in moves.items():
            old, room, held = (int(each[kind]) for each in (spans.start_2, spans.room_2, held_2))
            needed = max(int(needed_2[kind]), held)
            if needed <= room and source is None:
                continue
            start = self._take(kind, more := max(needed + HEADROOM, room * 3 // 2))
            if held:
                first = old if source is None else int(source.spans.start_2[kind])
                made.sources.append((first, held))
                made.targets.append((start, held))
                if source is None:
                    made.left.append((old, held))
            if room:
                self._free[kind].give(old, old + room)
            spans.start_2[kind], spans.room_2[kind] = start, more

    def _carry_out(self, kind: int, moves: _Moves) -> None:
        """Reads all, clears what was left, then writes: rows may have got each other's room."""
        if not moves.sources:
            return
        sources_X, targets_X = self._index(moves.sources), self._index(moves.targets)
        left_X = self._index(moves.left) if moves.left else None
        for layer in self.kinds[kind]:
            store = self.layers[layer]
            held = store.index_select(1, sources_X)
            if left_X is not None:
                store.index_fill_(1, left_X, 0)
            store.index_copy_(1, targets_X, held)

    def _take(self, kind: int, size: int) -> int:
        start = self._free[kind].take(size)
        if start is None:
            held = self.layers[self.kinds[kind][0]].shape[1]
            self._grow(kind, max(2 * held, held + size))
            start = self._free[kind].take(size)
        assert start is not None
        return start

    def _grow(self, kind: int, positions: int) -> None:
        held = self.layers[self.kinds[kind][0]].shape[1]
        for layer in self.kinds[kind]:
            store = self.layers[layer]
            with torch.inference_mode(mode=False):
                grown = store.new_zeros((2, positions, *store.shape[2:]))
            grown[:, :held] = store
            self.layers[layer] = grown
        self._free[kind].give(held, positions)
        self.generation += 1

    def _collect(self) -> None:
        left: dict[int, list[tuple[int, int]]] = {kind: [] for kind in self.kinds}
        while self._released:
            spans = self._released.popleft()
            (used_2,) = self.fullest(spans.used_L[None])
            for kind, runs in left.items():
                if room := int(spans.room_2[kind]):
                    start = int(spans.start_2[kind])
                    runs.append((start, int(used_2[kind])))
                    self._free[kind].give(start, start + room)
        for kind, runs in left.items():
            if runs:
                left_X = self._index(runs)
                for layer in self.kinds[kind]:
                    self.layers[layer].index_fill_(1, left_X, 0)

    def _index(self, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """All positions of runs (first, count), on the device."""
        first_X, count_X = np.array(runs, np.int64).T
        return moved(torch.from_numpy(spread(first_X, count_X)), self.device)


def spread(first_X: Numbers, count_X: Numbers) -> Numbers:
    """The numbers of all runs that begin at `first` and have `count`, one run after the other."""
    shift: Numbers = np.repeat(first_X - (count_X.cumsum() - count_X), count_X)
    return shift + np.arange(len(shift))


class PooledCache:
    """A row's cache in a pool; what KVCache is, elsewhere."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        layers = len(pool.layers)
        self.spans = Spans(*(np.zeros(size, np.int64) for size in (2, 2, layers)))
        #: A row that this one begins with a copy of, as soon as it gets room of its own.
        self.behind: PooledCache | None = None
        weakref.finalize(self, pool.release, self.spans)

    def length(self, layer: int) -> int:
        """Positions held in a layer."""
        return int(self.spans.used_L[layer])

    def append(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Adds positions at the end."""
        used_L, kind = self.spans.used_L, self.pool.kind_L[layer]
        count = k_TKD.shape[0]
        needed_2 = np.zeros(2, np.int64)
        needed_2[kind] = used_L[layer] + count
        self.pool.make_room([self], needed_2[None])
        first = int(self.spans.start_2[kind] + used_L[layer])
        keys_TKD, values_TKD = self.pool.layers[layer][:, first : first + count]
        keys_TKD.copy_(k_TKD)
        values_TKD.copy_(v_TKD)
        used_L[layer] += count

    def begin(self, prefix: PooledCache | KVCache) -> None:
        """Adds a copy of another row to this one, which is empty. One of the same pool is copied
        once this row gets room: it may grow till then."""
        assert not self.spans.used_L.any()
        if isinstance(prefix, KVCache):
            for layer in range(len(self.spans.used_L)):
                keys_KSD, values_KSD = prefix.read(layer)
                self.append(layer, keys_KSD.transpose(0, 1), values_KSD.transpose(0, 1))
            return
        assert prefix.pool is self.pool
        self.behind = prefix if prefix.behind is None else prefix.behind
        self.spans.used_L[:] = prefix.spans.used_L

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, S, D] as views, valid until the next append of any row."""
        self.pool.make_room([self], np.zeros((1, 2), np.int64))
        start = int(self.spans.start_2[self.pool.kind_L[layer]])
        held = self.pool.layers[layer][:, start : start + self.length(layer)].transpose(1, 2)
        return held[0], held[1]


Cache = KVCache | PooledCache
