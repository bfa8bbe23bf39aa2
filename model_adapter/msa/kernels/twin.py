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
    """Flat fp32 scores, laid out as the plan says."""
    parts = []
    question = 0
    for memory, (spans, count) in enumerate(zip(plan.spans, plan.questions, strict=True)):
        chosen = slice(question * rows.tokens, (question + count) * rows.tokens)
        best_CB = torch.cat(
            [
                _block(keys[memory], rows, chosen, first)
                for first in range(0, spans.chunks, _BLOCK_CHUNKS)
            ]
        )
        index_CB = spans.document_C.long()[:, None].expand(-1, count)
        scores_NB = best_CB.new_full((spans.documents, count), -torch.inf)
        parts.append(scores_NB.scatter_reduce_(0, index_CB, best_CB, "amax").T.flatten())
        question += count
    return torch.cat(parts)


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
