"""Scores and choices of documents for a batch of questions, on a GPU by the fused kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model_adapter.msa.kernels import twin
from model_adapter.msa.kernels.keys import KeyFormat, RoutingKeys, floats
from model_adapter.msa.kernels.plan import TILE_CHUNKS, Offsets, Plan, Spans
from model_adapter.msa.kernels.rows import Rows

#: Rows multiplied at once by one program, at most: more only grow its registers.
_BLOCK_ROWS = 128
#: Documents of one program of the choice.
_BLOCK_DOCUMENTS = 2048
_BITS = {KeyFormat.FLOAT: 0, KeyFormat.INT8: 8, KeyFormat.INT4: 4}


@dataclass(frozen=True, eq=False)
class Chosen:
    """Positions and scores [B, k] of the best documents, best first; ties go to the lower
    position. A memory of fewer documents gives fewer columns."""

    documents_BK: torch.Tensor
    scores_BK: torch.Tensor


def fused_available(device: torch.device) -> bool:
    """Whether the kernels run there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def score(
    plan: Plan, keys: Sequence[RoutingKeys], rows: Rows, *, fused: bool | None = None
) -> torch.Tensor:
    """Flat fp32 scores of every question and document of its memory, laid out as the plan
    says. keys: one layer of each memory, all of one format, width and group.

    fused: by the kernels or the twin; by default whichever the device allows.
    """
    if fused is None:
        fused = fused_available(keys[0].values_CE.device)
    return _fused(plan, keys, rows) if fused else twin.score(plan, keys, rows)


def best(scores_BN: torch.Tensor, k: int, *, fused: bool | None = None) -> Chosen:
    """The k best documents of each question over one memory."""
    if fused is None:
        fused = fused_available(scores_BN.device)
    k = min(k, scores_BN.shape[1])
    keys_BX = _partial_best(scores_BN, k) if fused else twin.order_keys(scores_BN)
    top_BK = keys_BX.topk(k, dim=1).values
    documents_BK = 0xFFFFFFFF - (top_BK & 0xFFFFFFFF)
    return Chosen(documents_BK, scores_BN.gather(1, documents_BK))


def two_stage(
    spans: Spans,
    offsets_N1: Offsets,
    coarse: RoutingKeys,
    exact_CE: torch.Tensor,
    questions: Sequence[torch.Tensor],
    *,
    k: int,
    survivors: int,
) -> Chosen:
    """A pass over low-bit keys on the device, then exact scores of the best `survivors`
    documents of each question, whose keys come from exact_CE in host RAM.

    survivors >= k; the more, the surer that the exact best are among them.
    """
    plan = Plan.of([spans], [len(questions)])
    rows = Rows.of(questions, coarse)
    rough = best(plan.split(score(plan, [coarse], rows))[0], survivors)
    kept_N = np.unique(rough.documents_BK.cpu().numpy())
    counts_N = offsets_N1[kept_N + 1] - offsets_N1[kept_N]
    compact_N1 = np.concatenate(([0], np.cumsum(counts_N))).astype(np.int64)
    chunks = np.repeat(offsets_N1[kept_N] - compact_N1[:-1], counts_N) + np.arange(compact_N1[-1])
    device = coarse.values_CE.device
    gathered_CE = exact_CE[torch.from_numpy(chunks)].to(device, non_blocking=True)
    exact = floats(gathered_CE, coarse.group)
    narrow = Plan.of([Spans.of(compact_N1, device)], [len(questions)])
    scores_BN = narrow.split(score(narrow, [exact], Rows.of(questions, exact)))[0]
    found = best(scores_BN, k)
    kept = torch.from_numpy(kept_N).to(device)
    return Chosen(kept[found.documents_BK], found.scores_BK)


def _fused(plan: Plan, keys: Sequence[RoutingKeys], rows: Rows) -> torch.Tensor:
    from model_adapter.msa.kernels import fused  # noqa: PLC0415  # triton is optional

    first, device = keys[0], keys[0].values_CE.device
    scales = [first.values_CE if item.scale_CS is None else item.scale_CS for item in keys]
    scores = torch.full((plan.size,), -torch.inf, device=device)
    questions = max(1, _BLOCK_ROWS // rows.tokens)
    fused.score_tiles[(plan.tiles_T4.shape[0],)](
        plan.tiles_T4,
        plan.memories_M4,
        _addresses([item.values_CE for item in keys], device),
        _addresses(scales, device),
        _addresses([spans.document_C for spans in plan.spans], device),
        rows.high_RE,
        rows.low_RE,
        rows.scale_R,
        rows.bias_R,
        scores,
        WIDTH=first.width,
        GROUP=first.group,
        CHUNKS=TILE_CHUNKS,
        QUESTIONS=min(questions, 1 << (max(plan.questions) - 1).bit_length()),
        TOKENS=rows.tokens,
        FORMAT=_BITS[first.format],
        TWO_PARTS=first.values_CE.dtype is not torch.float32,
    )
    return scores


def _addresses(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor([item.data_ptr() for item in tensors], dtype=torch.int64, device=device)


def _partial_best(scores_BN: torch.Tensor, k: int) -> torch.Tensor:
    from model_adapter.msa.kernels import fused  # noqa: PLC0415  # triton is optional

    questions, documents = scores_BN.shape
    blocks = -(-documents // _BLOCK_DOCUMENTS)
    found = torch.empty(questions, blocks * k, dtype=torch.int64, device=scores_BN.device)
    fused.partial_best[(blocks, questions)](
        scores_BN.contiguous(), found, documents, BLOCK=_BLOCK_DOCUMENTS, K=k
    )
    return found
