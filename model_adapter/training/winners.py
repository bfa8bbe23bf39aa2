"""Gathers and maxima whose gradients are gathers, too.

Autograd's own gradient of an index adds rows up, which on a GPU is either in any order or, where
runs must repeat, sorted and slow. Here every row has one source, known beforehand.

Shape suffixes: Q queries, S slots of a query's tokens, D documents, C chunks, X a document's
most chunks, T tokens, E width of a key.
"""

from __future__ import annotations

from typing import Any

import torch

#: Far below any score, yet finite: a softmax over it has no NaN in its gradient.
NEVER = -1e4


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TE: torch.Tensor, slots_QS: torch.Tensor, place_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(place_T)
        return x_TE[slots_QS]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_T,) = ctx.saved_tensors
        rows = gradients[0].flatten(0, 1)
        none = rows.new_zeros(1, rows.shape[1])
        return torch.cat((rows, none))[place_T], None, None


def take_slots(x_TE: torch.Tensor, slots_QS: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
    """x[slots] [Q, S, E]. place_T: the one slot (q * S + s) that each token's gradient comes
    from, Q * S for a token that has none; slots that repeat a token have no gradient."""
    apply: Any = _Slots.apply
    taken: torch.Tensor = apply(x_TE, slots_QS, place_T)
    return taken


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QSE: torch.Tensor,
        votes_QS: torch.Tensor,
        keys_CE: torch.Tensor,
        chunks_DX: torch.Tensor,
    ) -> torch.Tensor:
        queries, slots, _ = query_QSE.shape
        product_QSC = (query_QSE.flatten(0, 1) @ keys_CE.T).view(queries, slots, -1)
        product_QSC.masked_fill_(~votes_QS[:, :, None], NEVER)
        best_QC, slot_QC = product_QSC.max(dim=1)
        scores_QD, x_QD = best_QC[:, chunks_DX].max(dim=2)
        chunk_QD = chunks_DX[torch.arange(len(chunks_DX), device=x_QD.device), x_QD]
        ctx.save_for_backward(query_QSE, keys_CE, slot_QC.gather(1, chunk_QD), chunk_QD)
        return scores_QD

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        query_QSE, keys_CE, slot_QD, chunk_QD = ctx.saved_tensors
        queries, slots, _ = query_QSE.shape
        chunks = len(keys_CE)
        product_QX = query_QSE.new_zeros(queries, slots * chunks)
        # A chunk is of one document, so that no two gradients meet.
        product_QX.scatter_(1, slot_QD * chunks + chunk_QD, gradients[0])
        product_XC = product_QX.view(queries * slots, chunks)
        query = (product_XC @ keys_CE).view_as(query_QSE)
        return query, None, product_XC.T @ query_QSE.flatten(0, 1), None


def best_scores(
    query_QSE: torch.Tensor,
    votes_QS: torch.Tensor,
    keys_CE: torch.Tensor,
    chunks_DX: torch.Tensor,
) -> torch.Tensor:
    """fp32 [Q, D]: the largest product of a voting token and one of the document's chunks.

    chunks_DX: places of a document's chunks, which no other document has; the first one is
    repeated where it has fewer than others. The gradient goes to the winners alone.
    """
    apply: Any = _Scores.apply
    scores_QD: torch.Tensor = apply(query_QSE, votes_QS, keys_CE, chunks_DX)
    return scores_QD
