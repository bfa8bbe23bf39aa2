"""One decoded token for a batch of rows, over buffers that never move: what a CUDA graph replays.

Batches are filled up to a few sizes, one graph each. Rows that only fill up write to the
pool's position that is nobody's and read nothing else, so they change no other row.
Shape suffixes are those of model.py; B rows of the filled-up batch, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum

import numpy as np
import torch

from model_adapter.msa import rows_attention
from model_adapter.msa.model import Decoder
from model_adapter.msa.pool import NOBODYS, KVPool, PooledCache
from model_adapter.msa.rows_attention import Placed

log = logging.getLogger(__name__)

#: Between two ways to compute in bf16, relative to the largest logit.
_TOLERANCE = 0.05


class Way(Enum):
    """How rows of a pool step: flash attention replayed as a graph, flash attention, or a
    padded copy."""

    GRAPHS = "flash attention in CUDA graphs"
    FLASH = "flash attention"
    PADDED = "a padded copy"

    @property
    def flash(self) -> bool:
        """By torch's flash attention."""
        return self is not Way.PADDED


#: Rows of a batch. More rows run without a graph.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class DecodeStep:
    """A step of one size."""

    def __init__(self, decoder: Decoder, pool: KVPool, rows: int, way: Way) -> None:
        layers, device = decoder.config.num_layers, decoder.device
        self._decoder, self._pool, self._rows, self._way = decoder, pool, rows, way
        self._graph: torch.cuda.CUDAGraph | None = None
        #: What a captured graph reads stays where it is as long as the graph.
        self._read: tuple[torch.Tensor, ...] = ()
        self._generation = -1
        #: What changes with every step, in one transfer: ids, positions and the slots of every
        #: layer [2 + L, B], then starts [L, B + 1] and used [L, B] of every layer.
        wide, narrow = (2 + layers) * rows, layers * (2 * rows + 1)
        self._held = torch.zeros(8 * wide + 4 * narrow, dtype=torch.uint8, device=device)
        self._wide = self._held[: 8 * wide].view(torch.int64).view(2 + layers, rows)
        table = self._held[8 * wide :].view(torch.int32)
        self._starts = table[: layers * (rows + 1)].view(layers, rows + 1)
        self._used = table[layers * (rows + 1) :].view(layers, rows).fill_(1)
        self._ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._logits_BV: torch.Tensor | None = None
        self._most = 1

    def run(
        self, caches: Sequence[PooledCache], tokens: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor:
        """fp32 logits [R, V] behind each row's token; the rows grow by it."""
        self._fill(caches, tokens, positions)
        if self._way is not Way.GRAPHS:
            self._logits_BV = self._forward()
        else:
            if self._generation != self._pool.generation:
                with self._pool.lock:
                    self._capture()
            assert self._graph is not None
            self._graph.replay()
        assert self._logits_BV is not None
        return self._logits_BV[: len(tokens)]

    def _fill(
        self, caches: Sequence[PooledCache], tokens: Sequence[int], positions: Sequence[int]
    ) -> None:
        pool, kind_L, asked = self._pool, self._pool.kind_L, len(caches)
        spans = [cache.spans for cache in caches]
        used_RL = np.stack([one.used_L for one in spans]) + 1
        pool.make_room(caches, pool.fullest(used_RL))
        for one, used_L in zip(spans, used_RL, strict=True):
            one.used_L[:] = used_L
        start_RL = np.stack([one.start_2 for one in spans])[:, kind_L]
        layers = len(kind_L)
        wide = np.zeros((2 + layers, self._rows), np.int64)
        wide[2:] = NOBODYS
        wide[0, :asked], wide[1, :asked] = tokens, positions
        wide[2:, :asked] = (start_RL + used_RL - 1).T
        starts = np.full((layers, self._rows + 1), NOBODYS, np.int32)
        starts[:, :asked] = start_RL.T
        used = np.ones((layers, self._rows), np.int32)
        used[:, :asked] = used_RL.T
        parts = [part.view(np.uint8).ravel() for part in (wide, starts, used)]
        self._held.copy_(torch.from_numpy(np.concatenate(parts)))
        self._most = int(used_RL.max())

    def _forward(self) -> torch.Tensor:
        decoder = self._decoder
        cos_BD, sin_BD = decoder.rope.taken(self._wide[1])
        hidden_BM = decoder.embed(self._wide[0])
        for layer, store in enumerate(self._pool.layers):
            made = decoder.project(layer, hidden_BM, cos_BD, sin_BD)
            # A graph is replayed for rows of any length: its bound is the pool's size.
            most = store.shape[1] if self._way is Way.GRAPHS else self._most
            placed = Placed(self._wide[2 + layer], self._starts[layer], self._used[layer], most)
            rows_attention.write(store, placed.slots_T, made.k_TKD, made.v_TKD)
            if self._way.flash:
                out = rows_attention.flash(made.q_THD, store, self._ends, placed, 1)
            else:
                out = rows_attention.padded(made.q_THD, store, [1] * self._rows, placed)
            hidden_BM = decoder.finish(layer, hidden_BM, out)
        return decoder.logits(hidden_BM)

    def _capture(self) -> None:
        """Runs once beside, as capture asks for, and then captures. Both write what the replay
        writes again."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self._read = self._decoder.rope.tables()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._forward()
        self._generation = self._pool.generation


class PooledRows:
    """A decoder's rows in one pool, and steps of all sizes, made as they are needed.

    positions: of a row that steps by a graph, at most.
    """

    def __init__(self, decoder: Decoder, positions: int, way: Way) -> None:
        decoder.rope.reach(positions)
        self.pool = KVPool(decoder.config, decoder.dtype, decoder.device)
        self.way = way
        self._decoder, self._positions = decoder, positions
        self._steps: dict[int, DecodeStep] = {}

    def step(
        self, caches: Sequence[PooledCache], tokens: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor | None:
        """See DecodeStep.run; None when no size fits."""
        rows = next((size for size in BUCKETS if size >= len(tokens)), 0)
        if not rows or max(positions) >= self._positions:
            return None
        if rows not in self._steps:
            self._steps[rows] = DecodeStep(self._decoder, self.pool, rows, self.way)
        return self._steps[rows].run(caches, tokens, positions)


def choose(decoder: Decoder, positions: int, device: torch.device) -> tuple[PooledRows | None, str]:
    """Rows in a pool on a GPU, by the fastest way that is found to compute right; and why."""
    if device.type != "cuda":
        return None, "every row attends alone: no GPU"
    if decoder.dtype is torch.float32:
        return PooledRows(decoder, positions, Way.PADDED), "rows attend padded: fp32"
    wrong = ""
    for way in (Way.GRAPHS, Way.FLASH):
        wrong = check(decoder, positions, way)
        if not wrong:
            return PooledRows(decoder, positions, way), f"rows attend by {way.value}"
        log.warning("decoding does not go by %s: %s", way.value, wrong)
    return PooledRows(decoder, positions, Way.PADDED), f"rows attend padded: {wrong}"


def check(decoder: Decoder, positions: int, way: Way) -> str:
    """Steps two rows twice in this way and padded; what is wrong, empty when nothing."""
    found = []
    for each in (Way.PADDED, way):
        rows = PooledRows(decoder, positions, each)
        caches = [PooledCache(rows.pool) for _ in range(2)]
        try:
            for turn in range(3):
                logits_RV = rows.step(caches, [turn, turn + 1], [turn, turn])
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        assert logits_RV is not None
        found.append(logits_RV.clone())
    difference = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    return "" if difference <= _TOLERANCE else f"logits differ by {difference:.2g} of the largest"
