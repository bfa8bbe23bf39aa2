"""Attention of many rows in one call, over keys and values that lie in a pool.

On a GPU torch's flash attention for sequences of different lengths reads every row's span
where it lies. Elsewhere, and in fp32, the same is computed over a padded copy.
Shape suffixes are those of model.py; R rows, S positions of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from model_adapter.msa.pool import PooledCache


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
    """Rows of one pass, each with its own number of tokens, every token causal."""

    def __init__(
        self,
        caches: Sequence[PooledCache],
        counts: Sequence[int],
        device: torch.device,
        *,
        flash: bool,
        settled: bool,
    ) -> None:
        """settled: nothing but the tokens joins the rows on the way, so that all layers' places
        are worked out, and brought to the device, at once."""
        self._caches, self._counts, self._device = caches, counts, device
        self._flash = flash
        ends_R1 = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        self._ends_R1 = torch.from_numpy(ends_R1).to(device)
        layers = range(len(caches[0].spans)) if settled else range(0)
        self._placed = place(caches, counts, layers, device) if settled else []

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Appends the tokens' keys and values to their rows; attention output [T, H, D]."""
        if self._placed:
            placed = self._placed[layer]
        else:
            (placed,) = place(self._caches, self._counts, [layer], self._device)
        store = self._caches[0].pool.layers[layer]
        write(store, placed.slots_T, k_TKD, v_TKD)
        if self._flash:
            return flash(q_THD, store, self._ends_R1, placed, max(self._counts))
        return padded(q_THD, store, self._counts, placed)


def place(
    caches: Sequence[PooledCache],
    counts: Sequence[int],
    layers: Sequence[int],
    device: torch.device,
) -> list[Placed]:
    """Reserves positions of some layers for the tokens of all rows; one for each layer."""
    pool, count_R = caches[0].pool, np.asarray(counts)
    firsts, starts, used = [], [], []
    for layer in layers:
        spans = [cache.spans[layer] for cache in caches]
        firsts.append([pool.reserve(layer, *each) for each in zip(spans, counts, strict=True)])
        starts.append([*(span.start for span in spans), 0])
        used.append([span.length for span in spans])
    # Of every token, how far behind its row's first one it is.
    behind_T = np.arange(count_R.sum()) - np.repeat(count_R.cumsum() - count_R, count_R)
    slots_LT = np.repeat(np.array(firsts, np.int64), count_R, axis=1) + behind_T
    wide_LX = torch.from_numpy(np.concatenate((starts, used), axis=1).astype(np.int32)).to(device)
    rows = len(caches) + 1
    return [
        Placed(slots_T, table_X[:rows], table_X[rows:], max(most))
        for slots_T, table_X, most in zip(
            torch.from_numpy(slots_LT).to(device), wide_LX, used, strict=True
        )
    ]


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
