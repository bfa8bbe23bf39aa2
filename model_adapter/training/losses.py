"""Losses of routing (paper section 3.3) and of answering, on one batch.

Shape suffixes: Q queries, D documents, S slots of a query's tokens, C chunks, E = K * D'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from model_adapter.training.winners import NEVER, best_scores

#: A document that the teacher scores this much above the gold one is no negative.
FALSE_NEGATIVE_MARGIN = 0.1
TEACHER_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Relevance:
    """positive_QD: gold. ignored_QD: neither gold nor a negative."""

    positive_QD: torch.Tensor
    ignored_QD: torch.Tensor


def without_false_negatives(
    positive_QD: torch.Tensor, ignored_QD: torch.Tensor, teacher_QD: torch.Tensor | None
) -> Relevance:
    """Also ignores what the teacher's cosines hold for an answer as good as the gold document."""
    if teacher_QD is not None:
        gold_Q = teacher_QD.masked_fill(~positive_QD, 2.0).amin(dim=1, keepdim=True)
        ignored_QD = ignored_QD | (teacher_QD > gold_Q + FALSE_NEGATIVE_MARGIN)
    return Relevance(positive_QD, ignored_QD & ~positive_QD)


def document_scores(
    query_QSE: torch.Tensor,
    slots_QS: torch.Tensor,
    keys_CE: torch.Tensor,
    chunks_DX: torch.Tensor,
    *,
    mean_tokens: bool,
) -> torch.Tensor:
    """fp32 scores [Q, D] of one layer, as routing computes them: products, then over tokens
    (maximum or mean), then the maximum over chunks.

    slots_QS: slots that hold a voting token. chunks_DX: places of a document's chunks, the
    first one repeated where it has fewer than others.
    """
    if mean_tokens:
        mean_QE = (query_QSE * slots_QS[:, :, None]).sum(1) / slots_QS.sum(1, keepdim=True)
        scores_QC = mean_QE @ keys_CE.T
        return scores_QC[:, chunks_DX].max(dim=2).values
    return best_scores(query_QSE, slots_QS, keys_CE, chunks_DX)


def contrastive(logits_QD: torch.Tensor, relevance: Relevance) -> torch.Tensor:
    """Supervised contrastive loss, mean over queries of the mean over their gold documents:
    each against the negatives alone, other gold documents left out."""
    positive_QD = relevance.positive_QD
    excluded_QD = positive_QD | relevance.ignored_QD
    negatives_Q1 = logits_QD.masked_fill(excluded_QD, NEVER).logsumexp(dim=1, keepdim=True)
    loss_QD = torch.logaddexp(logits_QD, negatives_Q1) - logits_QD
    per_query = (loss_QD * positive_QD).sum(1) / positive_QD.sum(1).clamp_min(1)
    return per_query.mean()


def taught(
    cosines_QD: torch.Tensor | None, words_QD: torch.Tensor | None, share: float
) -> torch.Tensor | None:
    """What the teachers say together: cosines, and words with their share; None without any."""
    if cosines_QD is None or words_QD is None:
        return words_QD if cosines_QD is None else cosines_QD
    return torch.lerp(cosines_QD, words_QD, share)


def distillation(logits_QD: torch.Tensor, taught_QD: torch.Tensor) -> torch.Tensor:
    """KL from the teachers' softmax over the batch to ours, mean over queries."""
    target_QD = functional.log_softmax(taught_QD / TEACHER_TEMPERATURE, dim=1)
    ours_QD = functional.log_softmax(logits_QD, dim=1)
    return functional.kl_div(ours_QD, target_QD, reduction="batchmean", log_target=True)


def answers(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Next-token loss, mean over answer tokens."""
    return functional.cross_entropy(logits_TV, targets_T)
