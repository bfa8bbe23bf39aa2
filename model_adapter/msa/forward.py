"""One pass over packed rows: prefills with routing and decode steps side by side.

The linear layers see the tokens of all rows at once; attention, KV cache and routing
are per row, so that nothing of one row reaches another.

Shape suffixes are those of model.py; R rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from model_adapter.engine import EngineError, ResidentView
from model_adapter.msa.attending import attention_of, step
from model_adapter.msa.config import LayerChoice
from model_adapter.msa.kernel_pass import Asked, KernelPass, voters_of
from model_adapter.msa.model import Decoder, Probe, Projected, Want
from model_adapter.msa.pool import Cache
from model_adapter.msa.routing import prepare, score_documents, select
from model_adapter.msa.segments import (
    Attend,
    RoutingRequest,
    Row,
    RowRouting,
    Segment,
    new_row,
)

__all__ = [
    "Attend",
    "Outcome",
    "RoutingRequest",
    "Row",
    "RowRouting",
    "Segment",
    "encode_prefix",
    "new_row",
    "run",
]

#: Documents of each layer whose scores are exact when a mean over layers chooses: far more
#: than are taken, so that none of the best is known to bf16 alone.
COMBINED_EXACT = 128


@dataclass(frozen=True)
class Outcome:
    """logits: fp32 [R, V] of each row's last token, or all tokens packed [T, V] when
    asked for; None when the pass stopped after routing."""

    logits: torch.Tensor | None
    routings: list[RowRouting | None]


def run(
    decoder: Decoder,
    segments: Sequence[Segment],
    *,
    every_token: bool = False,
    only_routing: bool = False,
    probe: Probe | None = None,
) -> Outcome:
    """Runs every segment once and updates its row. No segment is empty.

    only_routing stops behind the last routed layer's choice; the rows are of no
    further use then. Under LayerChoice.COMBINED a row that routes runs twice, the first
    time for its routing alone. A memory that can't be read raises EngineError when the pass
    has one row; among several it is the row's own `RowRouting.error`.
    """
    if probe is None and (logits := step(decoder, segments)) is not None:
        return Outcome(logits, [None] * len(segments))
    together = decoder.config.msa.layer_choice is LayerChoice.COMBINED
    if together and not only_routing:
        routings = _look_ahead(decoder, segments)
    else:
        routings = [RowRouting() if segment.routing else None for segment in segments]
    kernels = None if together and not only_routing else _kernel_pass(decoder, segments)
    device = decoder.device
    ids_T = torch.tensor([token for segment in segments for token in segment.ids], device=device)
    positions = [s.row.position + offset for s in segments for offset in range(len(s.ids))]
    positions_T = torch.tensor(positions, device=device)
    cos_TD, sin_TD = decoder.rope.at(positions_T, max(positions) + 1)
    attend = attention_of(decoder, segments)
    hidden_TM = decoder.embed(ids_T)
    if probe is not None:
        probe("embed", hidden_TM)
    routed_layers = decoder.config.msa.routed_layers
    for index in range(decoder.config.num_layers):
        routes = index in routed_layers and any(segment.routing for segment in segments)
        want = Want.ROUTING_QUERY if routes else Want.CONTENT
        projected = decoder.project(index, hidden_TM, cos_TD, sin_TD, want)
        if routes and probe is not None and projected.routing_THD is not None:
            probe(f"routing_query{index}", projected.routing_THD)
        if routes:
            _route(decoder, index, segments, projected, routings, kernels=kernels)
        if index == routed_layers[-1]:
            _end_routing(decoder, segments, routings, kernels)
            if only_routing:
                return Outcome(None, routings)
        hidden_TM = decoder.finish(index, hidden_TM, attend(index, projected), probe)
    for segment in segments:
        if segment.attend is not Attend.GHOST:
            segment.row.position += len(segment.ids)
    if not every_token:
        ends = torch.tensor([len(segment.ids) for segment in segments]).cumsum(0) - 1
        hidden_TM = hidden_TM[ends.to(device)]
    return Outcome(decoder.logits(hidden_TM, probe), routings)


def _look_ahead(decoder: Decoder, segments: Sequence[Segment]) -> list[RowRouting | None]:
    """The choices of all rows that route, found on copies of the rows."""
    copies = []
    for segment in segments:
        if segment.routing is not None:
            row = new_row(decoder, segment.row.cache, segment.row.position)
            copies.append(replace(segment, row=row))
    found = iter(run(decoder, copies, only_routing=True).routings if copies else ())
    return [next(found) if segment.routing else None for segment in segments]


def _kernel_pass(decoder: Decoder, segments: Sequence[Segment]) -> KernelPass | None:
    """The rows whose memories' keys lie on the device, to be routed there together."""
    msa = decoder.config.msa
    if decoder.kernels is None:
        return None
    asked, first = list[Asked](), 0
    for place, segment in enumerate(segments):
        request = segment.routing
        memory = None if request is None or request.forced is not None else request.memory
        if request is not None and isinstance(memory, ResidentView):
            resident = memory.resident_keys()
            voters = voters_of(request.votes, first, request.last, msa)
            if resident is not None and voters:
                asked.append(Asked(place, resident, voters, request.k))
        first += len(segment.ids)
    together, fused = msa.layer_choice is LayerChoice.COMBINED, decoder.kernels.fused
    return KernelPass(asked, msa, together=together, fused=fused) if asked else None


def _end_routing(
    decoder: Decoder,
    segments: Sequence[Segment],
    routings: Sequence[RowRouting | None],
    kernels: KernelPass | None,
) -> None:
    """Behind the last routed layer: the choice of layers that choose together, unless it was
    known before, and what stayed on the device."""
    together = decoder.config.msa.layer_choice is LayerChoice.COMBINED
    if together:
        _choose_together(segments, routings, decoder.config.msa.routed_layers)
    if kernels is None:
        return
    started = time.perf_counter()
    if together:
        kernels.choose_together()
    for asked, board in zip(kernels.asked, kernels.boards(), strict=True):
        found = routings[asked.place]
        assert found is not None
        found.board = board
        found.chosen.update(asked.chosen)
        found.seconds += time.perf_counter() - started


def _choose_together(
    segments: Sequence[Segment], routings: Sequence[RowRouting | None], layers: Sequence[int]
) -> None:
    """One choice for all layers, by the mean of their scores, of rows that have not theirs."""
    for segment, found in zip(segments, routings, strict=True):
        request = segment.routing
        if request is None or found is None or not found.scores_N or found.chosen:
            continue
        found.combined_N = np.mean(list(found.scores_N.values()), axis=0, dtype=np.float32)
        best = select(found.combined_N, request.k)
        forced = request.forced or {}
        found.chosen = {layer: forced.get(layer, best) for layer in layers}


def _route(
    decoder: Decoder,
    index: int,
    segments: Sequence[Segment],
    projected: Projected,
    routings: Sequence[RowRouting | None],
    *,
    kernels: KernelPass | None,
) -> None:
    """Scores documents for every row that routes and appends its choice to its cache."""
    routing_THD = projected.routing_THD
    assert routing_THD is not None
    layer = decoder.config.msa.routed_layers.index(index)
    started = time.perf_counter()
    by_kernels = {}
    if kernels is not None:
        kernels.route(index, routing_THD, decoder.config.num_kv_heads)
        by_kernels = {asked.place: asked for asked in kernels.asked}
    elapsed = time.perf_counter() - started
    first = 0
    for place, (segment, found) in enumerate(zip(segments, routings, strict=True)):
        stop = first + len(segment.ids)
        request = segment.routing
        if request is not None and found is not None and found.error is None:
            try:
                if place in by_kernels:
                    found.chosen.update(by_kernels[place].chosen)
                    found.seconds += elapsed
                elif index not in found.chosen:
                    started = time.perf_counter()
                    _score(decoder, index, request, routing_THD[first:stop], found)
                    found.seconds += time.perf_counter() - started
                _take_in(decoder, index, layer, segment, found)
            except EngineError as error:
                if len(segments) == 1:
                    raise
                found.error = error
        first = stop


def _score(
    decoder: Decoder,
    index: int,
    request: RoutingRequest,
    routing_THD: torch.Tensor,
    found: RowRouting,
) -> None:
    """Scores of one layer and, when it chooses for itself, its choice."""
    c = decoder.config
    together = c.msa.layer_choice is LayerChoice.COMBINED
    query = prepare(
        routing_THD,
        torch.tensor(request.votes, device=decoder.device),
        c.num_kv_heads,
        c.msa,
        k=max(COMBINED_EXACT, request.k) if together else request.k,
        last=request.last,
    )
    if query is None or not len(request.memory.numbers_N):
        return
    layer = c.msa.routed_layers.index(index)
    scores_N = score_documents(query, request.memory, layer)
    found.scores_N[index] = scores_N
    if not together:
        forced = None if request.forced is None else request.forced[index]
        found.chosen[index] = select(scores_N, request.k) if forced is None else forced


def _take_in(decoder: Decoder, index: int, layer: int, segment: Segment, found: RowRouting) -> None:
    """Appends the chunks of the chosen documents to the row's cache, in document order."""
    chosen = found.chosen.get(index)
    if chosen is None or not len(chosen) or segment.routing is None:
        return
    keys_CE, values_CE = segment.routing.memory.content(layer, sorted(int(n) for n in chosen))
    shape = (keys_CE.shape[0], decoder.config.num_kv_heads, decoder.config.head_dim)
    segment.row.cache.append(
        index, keys_CE.to(decoder.device).view(shape), values_CE.to(decoder.device).view(shape)
    )


def encode_prefix(decoder: Decoder, head: Sequence[int]) -> Cache:
    """The template head alone, at positions from 0: the prefix of every question row."""
    row = new_row(decoder)
    if head:
        run(decoder, [Segment(row, head)])
    return row.cache
