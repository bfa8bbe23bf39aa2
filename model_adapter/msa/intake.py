"""Content of chosen documents into the caches of the rows that chose them, a layer at a time.

What several rows chose of one memory is read once, and where rows lie in a pool the content of all
of them is written in one go.
Shape suffixes are those of model.py; X chunks of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model_adapter.engine import EngineError
from model_adapter.msa.model import Decoder
from model_adapter.msa.packed import moved
from model_adapter.msa.pool import Numbers, PooledCache, spread
from model_adapter.msa.segments import RowRouting, Segment


@dataclass(frozen=True)
class Taker:
    """A row that takes content in. documents: positions in its memory, ascending."""

    segment: Segment
    found: RowRouting
    documents: Numbers


@dataclass(frozen=True)
class Fetched:
    """keys_CE, values_CE: of all documents that some of the takers chose. chunks: of each taker,
    which of them are its own, in document order."""

    takers: Sequence[Taker]
    keys_CE: torch.Tensor
    values_CE: torch.Tensor
    chunks: Sequence[Numbers]


def take_in(
    decoder: Decoder,
    index: int,
    segments: Sequence[Segment],
    routings: Sequence[RowRouting | None],
) -> None:
    """Appends the chunks of the documents that were chosen in a layer (its model index) to the
    rows' caches, in document order.

    A memory that cannot be read is its rows' own `error`; a single row's is raised.
    """
    layer = decoder.config.msa.routed_layers.index(index)
    groups: dict[int, list[Taker]] = {}
    for segment, found in zip(segments, routings, strict=True):
        chosen = None if found is None or found.error else found.chosen.get(index)
        if segment.routing is None or found is None or chosen is None or not len(chosen):
            continue
        taker = Taker(segment, found, np.sort(np.asarray(chosen, np.int64)))
        request = segment.routing
        shared = request.memory if request.resident is None else request.resident
        groups.setdefault(id(shared), []).append(taker)
    fetched = list[Fetched]()
    for takers in groups.values():
        try:
            fetched.append(_fetch(layer, takers))
        except EngineError as error:
            if len(segments) == 1:
                raise
            fetched += _apart(layer, takers, error)
    if fetched:
        _append(decoder, index, fetched)


def expected(segment: Segment) -> int:
    """Chunks that a row will take in per routed layer, roughly; it gets room for them at once."""
    request = segment.routing
    if request is None or not len(request.memory.numbers_N):
        return 0
    documents, chunks = len(request.memory.numbers_N), int(request.memory.chunk_offsets_N1[-1])
    return -(-min(request.k, documents) * chunks // documents)


def _fetch(layer: int, takers: Sequence[Taker]) -> Fetched:
    request = takers[0].segment.routing
    assert request is not None
    wanted = takers[0].documents
    if len(takers) > 1:
        wanted = np.unique(np.concatenate([taker.documents for taker in takers]))
    keys_CE, values_CE = request.memory.content(layer, wanted.tolist())
    offsets_N1 = request.memory.chunk_offsets_N1
    counts = offsets_N1[wanted + 1] - offsets_N1[wanted]
    firsts = counts.cumsum() - counts
    chunks = []
    for taker in takers:
        places = np.searchsorted(wanted, taker.documents)
        chunks.append(spread(firsts[places], counts[places]))
    return Fetched(takers, keys_CE, values_CE, chunks)


def _apart(layer: int, takers: Sequence[Taker], error: EngineError) -> list[Fetched]:
    """One by one, so that those who chose nothing that is damaged go on."""
    if len(takers) == 1:
        takers[0].found.error = error
        return []
    found = []
    for taker in takers:
        try:
            found.append(_fetch(layer, [taker]))
        except EngineError as own:
            taker.found.error = own
    return found


def _append(decoder: Decoder, index: int, fetched: Sequence[Fetched]) -> None:
    c = decoder.config
    keys, values = (
        _joined(parts, decoder.device).to(decoder.dtype).view(-1, c.num_kv_heads, c.head_dim)
        for parts in ([one.keys_CE for one in fetched], [one.values_CE for one in fetched])
    )
    caches, chunks, first = [], list[Numbers](), 0
    for one in fetched:
        caches += [taker.segment.row.cache for taker in one.takers]
        chunks += [places + first for places in one.chunks]
        first += one.keys_CE.shape[0]
    pooled = [cache for cache in caches if isinstance(cache, PooledCache)]
    if len(pooled) < len(caches):
        for cache, places in zip(caches, chunks, strict=True):
            if len(caches) == 1:  # all of it
                cache.append(index, keys, values)
                continue
            own = torch.from_numpy(places).to(decoder.device)
            cache.append(index, keys[own], values[own])
        return
    pool, kind = pooled[0].pool, pooled[0].pool.kind_L[index]
    count_R = np.array([len(places) for places in chunks])
    needed_R2 = np.zeros((len(pooled), 2), np.int64)
    needed_R2[:, kind] = [cache.length(index) for cache in pooled] + count_R
    pool.make_room(pooled, needed_R2)
    starts_R = np.array([cache.spans.start_2[kind] for cache in pooled])
    slots_X = spread(starts_R + needed_R2[:, kind] - count_R, count_R)
    for cache, used in zip(pooled, needed_R2[:, kind].tolist(), strict=True):
        cache.spans.used_L[index] = used
    both = moved(torch.from_numpy(np.stack((slots_X, np.concatenate(chunks)))), decoder.device)
    store = pool.layers[index]
    store[0].index_copy_(0, both[0], keys[both[1]])
    store[1].index_copy_(0, both[0], values[both[1]])


def _joined(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole if whole.device == device else moved(whole, device)
