"""Attention of many rows in one call, over keys and values that lie in a pool.

On a GPU torch's flash attention for sequences of different lengths reads every row's span
where it lies. Elsewhere, and in fp32, the same is computed over a padded copy.
Shape suffixes are those of model.py; R rows, S positions of the pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from model_adapter.msa.packed import moved
from model_adapter.msa.pool import PooledCache, spread


@dataclass(frozen=True, eq=False)
class Placed:
    """Where rows' tokens and positions lie in one layer of a pool.

    slots_T: int64, of every token. starts_R1, used_R: int32, each row's first position and
    how many it has, the tokens included; the last start stands for nothing. most: used at most.
    """

    slots_T: torch.Tensor
    starts_R1: torch.Tensor
    used_R: torch.Tensor
    most: int


class RowsAttention:
    """Rows of one pass, each with its own number of tokens, every token causal.

    What is known from the start is worked out, and brought to the device, for all layers at once:
    where tokens go, but for layers in which documents join a row on the way.
    """

    def __init__(
        self,
        caches: Sequence[PooledCache],
        counts: Sequence[int],
        device: torch.device,
        *,
        flash: bool,
        joining_R: Sequence[int] | None = None,
    ) -> None:
        """joining_R: positions of documents that are expected to join each row in routed layers;
        None where none do."""
        self._caches, self._device, self._flash = caches, device, flash
        self._pool = pool = caches[0].pool
        self._count_R = count_R = np.asarray(counts, np.int64)
        self._longest = int(count_R.max())
        needed_R2 = pool.fullest(np.stack([cache.spans.used_L for cache in caches]))
        needed_R2 += count_R[:, None]
        if joining_R is not None:
            needed_R2[:, 1] += np.asarray(joining_R)
        pool.make_room(caches, needed_R2)
        ends_R1 = np.concatenate(([0], count_R.cumsum())).astype(np.int32)
        self._ends_R1 = moved(torch.from_numpy(ends_R1), device)
        fixed = range(len(pool.layers)) if joining_R is None else pool.kinds.get(0, ())
        self._placed = self._place(fixed)

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Appends the tokens' keys and values to their rows; attention output [T, H, D]."""
        if layer not in self._placed:
            self._placed |= self._place([layer])
        placed, store = self._placed[layer], self._pool.layers[layer]
        write(store, placed.slots_T, k_TKD, v_TKD)
        if self._flash:
            return flash(q_THD, store, self._ends_R1, placed, self._longest)
        return padded(q_THD, store, self._count_R.tolist(), placed)

    def _place(self, layers: Iterable[int]) -> dict[int, Placed]:
        """Where the tokens go in each of these layers, of one kind or all; rows grow by them."""
        index_L = np.fromiter(layers, np.int64)
        if not len(index_L):
            return {}
        pool, spans = self._pool, [cache.spans for cache in self._caches]
        used_LR = np.stack([one.used_L[index_L] for one in spans], axis=1) + self._count_R
        kind_L = pool.kind_L[index_L]
        needed_R2 = np.zeros((len(spans), 2), np.int64)
        for kind in np.unique(kind_L):
            needed_R2[:, kind] = used_LR[kind_L == kind].max(axis=0)
        pool.make_room(self._caches, needed_R2)
        for one, used_L in zip(spans, used_LR.T, strict=True):
            one.used_L[index_L] = used_L
        start_LR = np.stack([one.start_2 for one in spans], axis=1)[kind_L]
        firsts_LR = start_LR + used_LR - self._count_R
        slots_LT = np.stack([spread(first_R, self._count_R) for first_R in firsts_LR])
        ends_L1 = np.zeros((len(index_L), 1), np.int64)
        table_LX = np.concatenate((start_LR, ends_L1, used_LR), axis=1).astype(np.int32)
        slots = moved(torch.from_numpy(slots_LT), self._device)
        table, rows = moved(torch.from_numpy(table_LX), self._device), len(spans) + 1
        most_L = used_LR.max(axis=1).tolist()
        return {
            layer: Placed(slots_T, table_X[:rows], table_X[rows:], most)
            for layer, slots_T, table_X, most in zip(
                index_L.tolist(), slots, table, most_L, strict=True
            )
        }


def write(
    store: torch.Tensor, slots_T: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
) -> None:
    """Puts keys and values of tokens into their slots of a layer [2, S, K, D]."""
    store[0].index_copy_(0, slots_T, k_TKD)
    store[1].index_copy_(0, slots_T, v_TKD)


def flash(
    q_THD: torch.Tensor,
    store: torch.Tensor,
    ends_R1: torch.Tensor,
    placed: Placed,
    longest: int,
) -> torch.Tensor:
    """By torch's kernel (bf16 or fp16 on a GPU). longest: tokens of a row at most."""
    out_THD: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q_THD, store[0], store[1], ends_R1, placed.starts_R1,
        longest, placed.most, 0.0, True, False, seqused_k=placed.used_R,
    )[0]  # fmt: skip
    return out_THD


def padded(
    q_THD: torch.Tensor, store: torch.Tensor, counts: Sequence[int], placed: Placed
) -> torch.Tensor:
    """The same by a copy of all rows' positions, padded to the longest."""
    rows, most, device = len(counts), max(counts), q_THD.device
    position_S = torch.arange(placed.most, device=device)
    index_RS = (placed.starts_R1[:rows, None] + position_S).clamp_max(store.shape[1] - 1)
    keys_RKSD, values_RKSD = (half[index_RS].transpose(1, 2) for half in store)
    count_R = torch.tensor(counts, device=device)
    # Token t of a row sees all but what its later tokens added; padding sees what the last does.
    later_RT = (count_R[:, None] - 1 - torch.arange(most, device=device)).clamp_min(0)
    seen_RTS = position_S < (placed.used_R[:, None] - later_RT)[:, :, None]
    row_T = torch.repeat_interleave(torch.arange(rows, device=device), count_R)
    begin_R = count_R.cumsum(0) - count_R
    token_T = torch.arange(len(q_THD), device=device) - begin_R[row_T]
    q_RTHD = q_THD.new_zeros(rows, most, *q_THD.shape[1:])
    q_RTHD[row_T, token_T] = q_THD
    out_RHTD = functional.scaled_dot_product_attention(
        q_RTHD.transpose(1, 2), keys_RKSD, values_RKSD, seen_RTS[:, None], enable_gqa=True
    )
    return out_RHTD.transpose(1, 2)[row_T, token_T]
