"""One pass over packed rows: prefills with routing and decode steps side by side.

The linear layers see the tokens of all rows at once; attention, KV cache and routing
are per row, so that nothing of one row reaches another.

Shape suffixes are those of model.py; R rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from model_adapter.engine import EngineError
from model_adapter.msa.attending import attention_of, step
from model_adapter.msa.config import LayerChoice
from model_adapter.msa.intake import take_in
from model_adapter.msa.kernel_pass import Asked, KernelPass, voters_of
from model_adapter.msa.model import Decoder, Probe, Projected, Want
from model_adapter.msa.packed import moved
from model_adapter.msa.pool import Cache, spread
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
    with decoder.phase("prefill"):
        hidden_TM = _layers(decoder, segments, routings, only_routing=only_routing, probe=probe)
        if hidden_TM is None:
            return Outcome(None, routings)
        for segment in segments:
            if segment.attend is not Attend.GHOST:
                segment.row.position += len(segment.ids)
        if not every_token:
            ends = np.cumsum([len(segment.ids) for segment in segments]) - 1
            hidden_TM = hidden_TM[moved(torch.from_numpy(ends), decoder.device)]
        return Outcome(decoder.logits(hidden_TM, probe), routings)


def _layers(
    decoder: Decoder,
    segments: Sequence[Segment],
    routings: Sequence[RowRouting | None],
    *,
    only_routing: bool,
    probe: Probe | None,
) -> torch.Tensor | None:
    """Hidden states [T, M] behind the last layer; None when it stopped after routing."""
    c = decoder.config
    with decoder.phase("routing"):
        chosen_before = c.msa.layer_choice is LayerChoice.COMBINED and not only_routing
        kernels = None if chosen_before else _kernel_pass(decoder, segments)
    ids_T, positions_T, end = _tokens(segments, decoder.device)
    cos_TD, sin_TD = decoder.rope.at(positions_T, end)
    with decoder.phase("rows"):
        attend = attention_of(decoder, segments)
    hidden_TM = decoder.embed(ids_T)
    if probe is not None:
        probe("embed", hidden_TM)
    routed_layers, last = c.msa.routed_layers, c.msa.routed_layers[-1]
    for index in range(c.num_layers):
        routes = index in routed_layers and any(segment.routing for segment in segments)
        want = Want.ROUTING_QUERY if routes else Want.CONTENT
        projected = decoder.project(index, hidden_TM, cos_TD, sin_TD, want)
        if routes:
            with decoder.phase("routing"):
                if probe is not None and projected.routing_THD is not None:
                    probe(f"routing_query{index}", projected.routing_THD)
                _route(decoder, index, segments, projected, routings, kernels=kernels)
        if index == last:
            with decoder.phase("routing"):
                _end_routing(decoder, segments, routings, kernels)
            if only_routing:
                return None
        if routes:
            with decoder.phase("fetch"):
                take_in(decoder, index, segments, routings)
        hidden_TM = decoder.finish(index, hidden_TM, attend(index, projected), probe)
    return hidden_TM


def _tokens(
    segments: Sequence[Segment], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All segments' ids and positions [T], in one transfer, and a bound above the positions."""
    counts = np.array([len(segment.ids) for segment in segments])
    firsts = np.array([segment.row.position for segment in segments])
    ids = np.fromiter(chain.from_iterable(segment.ids for segment in segments), np.int64)
    both = moved(torch.from_numpy(np.stack((ids, spread(firsts, counts)))), device)
    return both[0], both[1], int((firsts + counts).max())


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
        if request is not None and request.forced is None and request.resident is not None:
            voters = voters_of(request.votes, first, request.last, msa)
            if voters:
                known = request.resident
                asked.append(Asked(place, known, voters, request.k, others=request.others))
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
    boards = kernels.boards()
    seconds = time.perf_counter() - started
    for asked, board in zip(kernels.asked, boards, strict=True):
        found = routings[asked.place]
        assert found is not None
        found.board = board
        found.chosen.update(asked.chosen)
        found.seconds += seconds


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
    """Scores documents for every row that routes, and chooses unless layers choose together."""
    routing_THD = projected.routing_THD
    assert routing_THD is not None
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
            if place in by_kernels:
                found.chosen.update(by_kernels[place].chosen)
                found.seconds += elapsed
            elif index not in found.chosen:
                started = time.perf_counter()
                try:
                    _score(decoder, index, request, routing_THD[first:stop], found)
                except EngineError as error:
                    if len(segments) == 1:
                        raise
                    found.error = error
                found.seconds += time.perf_counter() - started
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


def encode_prefix(decoder: Decoder, head: Sequence[int]) -> Cache:
    """The template head alone, at positions from 0: the prefix of every question row."""
    row = new_row(decoder)
    if head:
        run(decoder, [Segment(row, head)])
    return row.cache
