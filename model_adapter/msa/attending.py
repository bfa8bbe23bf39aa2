"""Attention of a pass: all rows in one call where they lie in a pool, else row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from model_adapter.msa.intake import expected
from model_adapter.msa.model import Decoder, Projected
from model_adapter.msa.pool import PooledCache
from model_adapter.msa.rows_attention import RowsAttention
from model_adapter.msa.segments import Attend, Segment

#: Called with a layer's index and projections; adds keys and values to the rows and gives the
#: attention output [T, H, D].
Attention = Callable[[int, Projected], torch.Tensor]


def attention_of(decoder: Decoder, segments: Sequence[Segment]) -> Attention:
    """How this pass attends."""
    caches = _pooled(segments)
    if decoder.rows is None or caches is None:
        masks = [_mask(segment, decoder.device) for segment in segments]
        return lambda layer, projected: _attend(layer, segments, projected, masks)
    counts = [len(segment.ids) for segment in segments]
    joining = None
    if any(segment.routing for segment in segments):
        joining = [expected(segment) for segment in segments]
    flash = decoder.rows.way.flash
    rows = RowsAttention(caches, counts, decoder.device, flash=flash, joining_R=joining)
    return lambda layer, made: rows.attend(layer, made.q_THD, made.k_TKD, made.v_TKD)


def _pooled(segments: Sequence[Segment]) -> list[PooledCache] | None:
    """The rows' caches, when all are causal and in a pool."""
    caches = []
    for segment in segments:
        if segment.attend is not Attend.CAUSAL or not isinstance(segment.row.cache, PooledCache):
            return None
        caches.append(segment.row.cache)
    return caches


def step(decoder: Decoder, segments: Sequence[Segment]) -> torch.Tensor | None:
    """Logits of rows that only go on by a token each, where a pool steps them; else None."""
    if decoder.rows is None or (caches := _pooled(segments)) is None:
        return None
    if any(segment.routing is not None or len(segment.ids) > 1 for segment in segments):
        return None
    positions = [segment.row.position for segment in segments]
    with decoder.phase("decode"):
        logits_RV = decoder.rows.step(caches, [segment.ids[0] for segment in segments], positions)
    if logits_RV is not None:
        for segment in segments:
            segment.row.position += 1
    return logits_RV


def _attend(
    index: int,
    segments: Sequence[Segment],
    projected: Projected,
    masks: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Attention output [T, H, D], row by row."""
    parts = []
    first = 0
    for segment, mask_TT in zip(segments, masks, strict=True):
        stop = first + len(segment.ids)
        cache = segment.row.cache
        before = cache.length(index)
        if segment.attend is not Attend.GHOST:
            cache.append(index, projected.k_TKD[first:stop], projected.v_TKD[first:stop])
        keys_KSD, values_KSD = cache.read(index)
        mask_TS = None if mask_TT is None else functional.pad(mask_TT, (before, 0), value=True)
        out_1HTD = functional.scaled_dot_product_attention(
            projected.q_THD[first:stop].transpose(0, 1)[None],
            keys_KSD[None],
            values_KSD[None],
            attn_mask=mask_TS,
            enable_gqa=True,
        )
        parts.append(out_1HTD[0].transpose(0, 1))
        first = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mask(segment: Segment, device: torch.device) -> torch.Tensor | None:
    """What a segment's tokens see of the segment itself; None when that is all of it."""
    size = len(segment.ids)
    if size == 1 or segment.attend is not Attend.CAUSAL:
        return None
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()
