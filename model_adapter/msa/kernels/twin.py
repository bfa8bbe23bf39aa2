"""What the kernels compute, in plain torch: the reference of their tests, and the CPU's way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from model_adapter.msa.kernels.keys import RoutingKeys
from model_adapter.msa.kernels.plan import Plan
from model_adapter.msa.kernels.rows import Rows

#: Chunks multiplied at once.
_BLOCK_CHUNKS = 65536


def score(plan: Plan, keys: Sequence[RoutingKeys], rows: Rows) -> torch.Tensor:
    """Flat fp32 scores, laid out as the plan says. keys: one layer of each part."""
    scores = torch.full((plan.size,), -torch.inf, device=rows.bias_R.device)
    by_memory = plan.split(scores)
    firsts = [0]
    for count in plan.questions:
        firsts.append(firsts[-1] + count)
    for spans, owner, held in zip(plan.parts, plan.owners, keys, strict=True):
        chosen = slice(firsts[owner] * rows.tokens, firsts[owner + 1] * rows.tokens)
        best_CB = torch.cat(
            [_block(held, rows, chosen, first) for first in range(0, spans.chunks, _BLOCK_CHUNKS)]
        )
        counts_C = spans.document_C >= 0
        index_BC = spans.document_C[counts_C].long().expand(plan.questions[owner], -1)
        by_memory[owner].scatter_reduce_(1, index_BC, best_CB[counts_C].T, "amax")
    return scores


def _block(keys: RoutingKeys, rows: Rows, chosen: slice, first: int) -> torch.Tensor:
    """[c, B]: the largest product over a question's tokens, for a block of chunks."""
    stop = first + _BLOCK_CHUNKS
    scale_cS = None if keys.scale_CS is None else keys.scale_CS[first:stop]
    block = RoutingKeys(keys.format, keys.values_CE[first:stop], scale_cS, keys.group)
    product_cR = functional.linear(block.dequantised(), rows.values()[chosen])
    product_cR = product_cR + rows.bias_R[chosen]
    return product_cR.view(block.chunks, -1, rows.tokens).amax(dim=2)


def order_keys(scores_BN: torch.Tensor) -> torch.Tensor:
    """int64 that ascend with the score and, among equals, descend with the document."""
    bits_BN = (scores_BN + 0.0).view(torch.int32)  # one zero, not two
    ascending_BN = torch.where(bits_BN < 0, bits_BN ^ 0x7FFFFFFF, bits_BN).long()
    documents_N = torch.arange(scores_BN.shape[1], device=scores_BN.device)
    return (ascending_BN << 32) | (0xFFFFFFFF - documents_N)
