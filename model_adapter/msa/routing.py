"""Routing: scores of documents for a question, and the choice of the top k.

With the mean over query heads, the score of a token and a chunk is one inner product:

  mean_h q[t, h] . key[c, h // G]  =  (sum of the heads of each group / H)[t] . key[c]

of length E = K * D, so [heads, tokens, chunks] never exists: blocks of chunks are
multiplied and at once reduced over tokens. The maximum over heads has
no such form and is computed per kv head, block by block.

Scores are fp32. bf16 keys on a CPU are multiplied in bf16, whose results round to 8
bits, and every document that the rounding could have kept from the top k is then
scored again in fp32; so the choice is that of fp32 accumulation over the same keys.

Shape suffixes are those of model.py; Q voting tokens of a question (1 when they were
reduced before the product).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from model_adapter.engine import MemoryView
from model_adapter.msa.config import ChunkReduce, HeadReduce, MsaConfig, QueryReduce

Scores = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

#: Scores at or below this select nothing.
INVALID = -1e9
#: Chunks multiplied at once. Larger than a cache on purpose: every block costs a few
#: barriers between threads, which are dear when other work shares the cores.
BLOCK_CHUNKS = 131072
#: Twice the two bf16 roundings of a coarse score, as bound on its relative error ..
_COARSE_RELATIVE = 2.0**-6
#: .. and, for scores near zero, a share of the largest one.
_COARSE_ABSOLUTE = 2.0**-13


@dataclass(frozen=True)
class RoutingQuery:
    """A question's voting tokens, ready to be multiplied with routing keys.

    reduced_QE: fp32, when the head reduce is the mean; heads_QHD: fp32, when it is the
    maximum. k: how many documents will be selected, at most.
    """

    reduced_QE: torch.Tensor | None
    heads_QHD: torch.Tensor | None
    k: int
    query_reduce: QueryReduce
    chunk_reduce: ChunkReduce


def prepare(
    routing_THD: torch.Tensor,
    votes_T: torch.Tensor,
    num_kv_heads: int,
    msa: MsaConfig,
    *,
    k: int,
    last: int | None = None,
) -> RoutingQuery | None:
    """The routing query of one row; None when no token votes.

    last: token that stands for the row under QueryReduce.LAST, by default the last
    voting one. (The reference takes index votes - 1 of its padded row; parity runs
    pass that, and a token that does not vote then selects nothing.)
    """
    voters = torch.nonzero(votes_T).flatten()
    if msa.query_reduce is QueryReduce.LAST and len(voters):
        chosen = int(voters[-1]) if last is None else last
        voters = voters[voters == chosen]
    if not len(voters):
        return None
    q_QHD = scaled_query(routing_THD[voters], msa)
    if msa.head_reduce is HeadReduce.MAX:
        return RoutingQuery(None, q_QHD, k, msa.query_reduce, msa.chunk_reduce)
    reduced_QE = mean_heads(q_QHD, num_kv_heads)
    if msa.query_reduce is QueryReduce.MEAN:  # linear too: one vector stands for all tokens
        reduced_QE = reduced_QE.mean(dim=0, keepdim=True)
    return RoutingQuery(reduced_QE, None, k, msa.query_reduce, msa.chunk_reduce)


def scaled_query(routing_QHD: torch.Tensor, msa: MsaConfig) -> torch.Tensor:
    """fp32 routing queries [Q, H, D] as they are multiplied with keys."""
    q_QHD = routing_QHD.float()
    if msa.cosine:
        q_QHD = functional.normalize(q_QHD, dim=-1, eps=1e-12)
    return q_QHD * q_QHD.shape[-1] ** -0.5 if msa.query_scaled else q_QHD


def mean_heads(q_QHD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[Q, E] whose product with a key is the mean over query heads of their products."""
    heads, head_dim = q_QHD.shape[1:]
    groups_QKGD = q_QHD.view(-1, num_kv_heads, heads // num_kv_heads, head_dim)
    return (groups_QKGD.sum(dim=2) / heads).flatten(1)


def score_documents(query: RoutingQuery, memory: MemoryView, layer: int) -> Scores:
    """fp32 scores [N] of all documents in one routed layer (its index in the layout).

    The best k are exact to fp32 accumulation; others may carry bf16 rounding, but never
    so that one of them would pass one of the k.
    """
    offsets_N1 = memory.chunk_offsets_N1
    scores_N = np.full(len(offsets_N1) - 1, -np.inf, dtype=np.float32)
    for first_chunk, keys_CE in memory.routing_keys(layer):
        first = int(np.searchsorted(offsets_N1, first_chunk))
        stop = int(np.searchsorted(offsets_N1, first_chunk + keys_CE.shape[0]))
        starts_n1 = offsets_N1[first : stop + 1] - first_chunk
        scores_N[first:stop] = _score_slab(query, keys_CE, starts_n1)
    return scores_N


def score_chunks(query: RoutingQuery, keys_CE: torch.Tensor) -> torch.Tensor:
    """fp32 scores [C] of chunks, accumulated in fp32."""
    scores_C = torch.empty(keys_CE.shape[0], dtype=torch.float32, device=keys_CE.device)
    step = BLOCK_CHUNKS if keys_CE.dtype is torch.float32 else BLOCK_CHUNKS // 32
    for first in range(0, keys_CE.shape[0], step):
        block_cE = keys_CE[first : first + step].float()
        if query.reduced_QE is not None:
            product_cQ = functional.linear(block_cE, query.reduced_QE.to(block_cE.device))
        else:
            product_cQ = _head_max(query, block_cE)
        if query.query_reduce is QueryReduce.MEAN:
            scores_C[first : first + step] = product_cQ.mean(dim=1)
        else:
            scores_C[first : first + step] = product_cQ.amax(dim=1)
    return scores_C


def select(scores_N: Scores, k: int) -> Positions:
    """Positions of the best k valid documents, best first; ties go to the lower number."""
    valid = np.flatnonzero(scores_N > INVALID)
    if len(valid) > k:
        kept = scores_N[valid]
        threshold = np.partition(kept, len(valid) - k)[len(valid) - k]
        above = valid[kept > threshold]
        level = valid[kept == threshold][: k - len(above)]
        valid = np.concatenate((above, level))
    order = np.lexsort((valid, -scores_N[valid]))
    return valid[order].astype(np.int64)


def _score_slab(query: RoutingQuery, keys_CE: torch.Tensor, starts_n1: Positions) -> Scores:
    coarse = (
        keys_CE.dtype is torch.bfloat16
        and query.reduced_QE is not None
        and query.chunk_reduce is ChunkReduce.MAX
    )
    if coarse and keys_CE.is_cuda:
        return _reduce_chunks(query, _wide_products(query, keys_CE).cpu(), starts_n1)
    if coarse and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        scores_n = _reduce_chunks(query, _coarse_chunks(query, keys_CE), starts_n1)
        return _rescore(query, keys_CE, starts_n1, scores_n)
    return _reduce_chunks(query, score_chunks(query, keys_CE).cpu(), starts_n1)


def _reduce_chunks(query: RoutingQuery, scores_C: torch.Tensor, starts_n1: Positions) -> Scores:
    values: Scores = scores_C.numpy()
    if query.chunk_reduce is ChunkReduce.MAX:
        return np.maximum.reduceat(values, starts_n1[:-1])
    sums = np.add.reduceat(values, starts_n1[:-1])
    return (sums / np.diff(starts_n1)).astype(np.float32)


def _head_max(query: RoutingQuery, keys_cE: torch.Tensor) -> torch.Tensor:
    """[c, Q]: maximum over query heads, one kv head after the other."""
    assert query.heads_QHD is not None
    tokens, heads, head_dim = query.heads_QHD.shape
    group = heads * head_dim // keys_cE.shape[1]
    best_cQ: torch.Tensor | None = None
    for kv_head in range(heads // group):
        q_XD = query.heads_QHD[:, kv_head * group : (kv_head + 1) * group].transpose(0, 1)
        keys_cD = keys_cE[:, kv_head * head_dim : (kv_head + 1) * head_dim]
        product_cX = functional.linear(keys_cD, q_XD.reshape(-1, head_dim).to(keys_cD.device))
        part_cQ = product_cX.view(-1, group, tokens).amax(dim=1)
        best_cQ = part_cQ if best_cQ is None else torch.maximum(best_cQ, part_cQ)
    assert best_cQ is not None
    return best_cQ


def _split(query: RoutingQuery, device: torch.device) -> torch.Tensor:
    """The fp32 query as two bf16 halves [2Q, E], high parts first: 16 bits in all."""
    assert query.reduced_QE is not None
    wide_QE = query.reduced_QE.to(device)
    high_QE = wide_QE.bfloat16()
    return torch.cat((high_QE, (wide_QE - high_QE.float()).bfloat16()))


def _coarse_chunks(query: RoutingQuery, keys_CE: torch.Tensor) -> torch.Tensor:
    """[C] scores from a bf16 product, each within the coarse bound of the fp32 one."""
    split_XE = _split(query, keys_CE.device)
    tokens = split_XE.shape[0] // 2
    scores_C = torch.empty(keys_CE.shape[0], dtype=torch.float32)
    for first in range(0, keys_CE.shape[0], BLOCK_CHUNKS):
        product_cX = functional.linear(keys_CE[first : first + BLOCK_CHUNKS], split_XE)
        product_cQ = product_cX[:, :tokens] + product_cX[:, tokens:]
        scores_C[first : first + BLOCK_CHUNKS] = product_cQ.amax(dim=1)
    return scores_C


def _rescore(
    query: RoutingQuery, keys_CE: torch.Tensor, starts_n1: Positions, coarse_n: Scores
) -> Scores:
    """Replaces the scores of all documents that may belong to the best k by exact ones."""
    margin_n = _COARSE_RELATIVE * np.abs(coarse_n) + _COARSE_ABSOLUTE * np.abs(coarse_n).max()
    rank = len(coarse_n) - query.k
    candidates = np.arange(len(coarse_n))
    if rank > 0:
        floor = np.partition(coarse_n - margin_n, rank)[rank]
        candidates = np.flatnonzero(coarse_n + margin_n >= floor)
    counts = starts_n1[candidates + 1] - starts_n1[candidates]
    compact_n1 = np.concatenate(([0], np.cumsum(counts)))
    rows = np.repeat(starts_n1[candidates] - compact_n1[:-1], counts) + np.arange(compact_n1[-1])
    exact_C = score_chunks(query, keys_CE[torch.from_numpy(rows)])
    scores_n = coarse_n.copy()
    scores_n[candidates] = _reduce_chunks(query, exact_C, compact_n1)
    return scores_n


def _wide_products(query: RoutingQuery, keys_CE: torch.Tensor) -> torch.Tensor:
    """[C] scores on a GPU: bf16 products with fp32 results, so nothing is scored again."""
    split_XE = _split(query, keys_CE.device)
    tokens = split_XE.shape[0] // 2
    product_XC = torch.mm(split_XE, keys_CE.T, out_dtype=torch.float32)
    return (product_XC[:tokens] + product_XC[tokens:]).amax(dim=0)
