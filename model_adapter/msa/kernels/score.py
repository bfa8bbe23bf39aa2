"""Scores and choices of documents for a batch of questions, on a GPU by the fused kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from model_adapter.msa.kernels import launches, twin
from model_adapter.msa.kernels.keys import RoutingKeys, floats
from model_adapter.msa.kernels.launches import LOWEST, Addresses, Scoring
from model_adapter.msa.kernels.plan import Offsets, Plan, Spans
from model_adapter.msa.kernels.rows import Rows

Documents = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class Kernels(Enum):
    """What computes over keys on a device: Triton, or the same in plain torch."""

    FUSED = "fused"
    TWIN = "twin"

    @property
    def fused(self) -> bool:
        """By Triton."""
        return self is Kernels.FUSED


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
    k = min(k, scores_BN.shape[1])
    questions, documents = scores_BN.shape
    firsts_B = torch.arange(questions, device=scores_BN.device) * documents
    table_B2 = torch.stack((firsts_B, torch.full_like(firsts_B, documents)), dim=1)
    done_B = torch.zeros(questions, dtype=torch.int32, device=scores_BN.device)
    sizes = [documents] * questions
    top_BK = _best_keys(scores_BN.flatten(), table_B2, done_B, sizes, k, fused=fused)
    documents_BK = 0xFFFFFFFF - (top_BK & 0xFFFFFFFF)
    return Chosen(documents_BK, scores_BN.gather(1, documents_BK))


def best_keys(
    plan: Plan, scores: torch.Tensor, k: int, *, fused: bool | None = None
) -> torch.Tensor:
    """int64 [B, k] on the device: the k best of every question of the plan in one launch, best
    first, as `twin.order_keys` has them; LOWEST where a memory has fewer documents."""
    return _best_keys(scores, plan.questions_B2, plan.done_B, plan.asked, k, fused=fused)


def read_keys(keys_BK: torch.Tensor) -> list[tuple[Documents, Scores]]:
    """Positions and scores of each question's best, on the host: one transfer for all."""
    found = []
    for keys_K in keys_BK.cpu().numpy():
        kept_k = keys_K[keys_K != LOWEST]
        high_k = (kept_k >> 32).astype(np.int32)
        bits_k = np.where(high_k < 0, high_k ^ np.int32(0x7FFFFFFF), high_k)
        found.append((0xFFFFFFFF - (kept_k & 0xFFFFFFFF), bits_k.view(np.float32)))
    return found


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
    values = [item.values_CE[None] for item in keys]
    scales = [(item.values_CE if item.scale_CS is None else item.scale_CS)[None] for item in keys]
    addresses = Addresses.of(values, scales, [spans.document_C for spans in plan.parts])
    return Scoring(plan, keys[0], addresses, rows.tokens)(0, rows)


def _best_keys(
    scores: torch.Tensor,
    questions_B2: torch.Tensor,
    done_B: torch.Tensor,
    sizes: Sequence[int],
    k: int,
    *,
    fused: bool | None,
) -> torch.Tensor:
    if fused is None:
        fused = fused_available(scores.device)
    if fused and k <= launches.MOST_KEPT:
        return launches.best(scores, questions_B2, done_B, max(sizes), k)
    rows, first = [], 0
    for documents, alike in groupby(sizes):  # neighbours over memories of one size at once
        stop = first + documents * len(list(alike))
        keys_BN = twin.order_keys(scores[first:stop].view(-1, documents))
        kept_BK = keys_BN.topk(min(k, documents), dim=1).values
        rows.append(functional.pad(kept_BK, (0, k - kept_BK.shape[1]), value=LOWEST))
        first = stop
    return torch.cat(rows)
