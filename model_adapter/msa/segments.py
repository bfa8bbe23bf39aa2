"""What a pass runs: rows, the tokens to run for them, and what routing finds for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np

from model_adapter.engine import EngineError, MemoryView, ResidentView
from model_adapter.msa.boards import Board
from model_adapter.msa.kernels import ResidentKeys
from model_adapter.msa.kvcache import KVCache
from model_adapter.msa.model import Decoder
from model_adapter.msa.pool import Cache, PooledCache
from model_adapter.msa.routing import Positions, Scores


class Attend(Enum):
    """Who a segment's tokens see, beside everything cached before them.

    CAUSAL: themselves and earlier tokens of the segment. BIDIRECTIONAL: the whole
    segment (the reference does so when it puts the question in again). GHOST: only
    the cache, and they leave no trace in it (the reference's idle rows).
    """

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    GHOST = "ghost"


@dataclass
class Row:
    """A sequence that is being run. position: of its next token."""

    cache: Cache
    position: int


@dataclass(frozen=True)
class RoutingRequest:
    """Asks a prefill to route. votes: per token. k: documents per routed layer.

    forced: positions per model layer, taken instead of the best (parity runs). others: positions
    whose scores a ranking will ask for, whether they are among the best or not.
    """

    memory: MemoryView
    votes: Sequence[bool]
    k: int
    last: int | None = None
    forced: Mapping[int, Positions] | None = None
    others: Positions = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def resident(self) -> ResidentKeys | None:
        """The memory's keys on the device, if they lie there. Views with the same ones have the
        same documents at the same positions."""
        return self.memory.resident_keys() if isinstance(self.memory, ResidentView) else None


@dataclass(frozen=True)
class Segment:
    """Tokens to run for a row."""

    row: Row
    ids: Sequence[int]
    routing: RoutingRequest | None = None
    attend: Attend = Attend.CAUSAL


@dataclass
class RowRouting:
    """What routing found for one row, by model layer; combined_N under LayerChoice.COMBINED.

    board: all scores, where they stayed on the device; scores_N is empty then. error: why the
    memory could not be read, in a pass of several rows; the row is of no further use.
    """

    scores_N: dict[int, Scores] = field(default_factory=dict)
    chosen: dict[int, Positions] = field(default_factory=dict)
    combined_N: Scores | None = None
    board: Board | None = None
    error: EngineError | None = None
    seconds: float = 0.0


def new_row(decoder: Decoder, prefix: Cache | None = None, position: int = 0) -> Row:
    """A fresh row, behind a copy of the template prefix or behind nothing."""
    if decoder.rows is not None:
        cache: Cache = PooledCache(decoder.rows.pool)
    else:
        cache = KVCache(decoder.config, decoder.dtype, decoder.device)
    if prefix is not None:
        cache.begin(prefix)
    return Row(cache, position)
