"""Sequences side by side, each alone: what encoding and training run.

The linear layers see the tokens of all sequences at once, packed without padding;
attention is causal within a sequence, so that no token of one reaches another.
Everything here is differentiable.

Shape suffixes are those of model.py; B sequences, P the longest one's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from model_adapter.msa.model import Decoder, Probe, Projected, Want

#: Called with a routed layer's index and projections.
See = Callable[[int, Projected], None]


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device. A GPU gets it behind what it was given before, out of pinned
    memory, so that nobody waits for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Rows(Protocol):
    """Where sequences lie and what their tokens attend to."""

    @property
    def position_T(self) -> torch.Tensor:
        """The position of every token."""
        ...

    @property
    def positions_end(self) -> int:
        """Above all positions."""
        ...

    def attend(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Attention output [T, H, D]."""
        ...


class PackedRows:
    """Where the sequences of a packed batch lie, and attention within each.

    position_T: of every token; from 0 in each sequence unless `positions` gives others, and
    a bound above them.
    training: attend by what has the faster gradient, for the many short sequences of a
    step: on a GPU the kernel for sequences of different lengths, on a CPU plain products.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        positions: tuple[torch.Tensor, int] | None = None,
        *,
        training: bool = False,
        varlen: bool = False,
    ) -> None:
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self._even = min(self.lengths) == self.longest
        counts = np.array(self.lengths)
        ends = np.concatenate(([0], counts.cumsum()))
        place = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
        if positions is None:
            positions = moved(torch.from_numpy(place), device), self.longest
        self.position_T, self.positions_end = positions
        self._ends_B1 = None
        self._plain = training and device.type == "cpu"
        if varlen or (training and not self._plain):
            self._ends_B1 = moved(torch.from_numpy(ends.astype(np.int32)), device)
        else:
            slots = np.repeat(np.arange(len(counts)), counts) * self.longest + place
            self._slot_T = moved(torch.from_numpy(slots), device)

    def attend(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Attention output [T, H, D]."""
        if self._ends_B1 is not None:
            out_THD: torch.Tensor = torch.ops.aten._flash_attention_forward(
                q_THD, k_TKD, v_TKD, self._ends_B1, self._ends_B1,
                self.longest, self.longest, 0.0, True, False,
            )[0]  # fmt: skip
            return out_THD
        padded = self._pad(q_THD), self._pad(k_TKD), self._pad(v_TKD)
        if self._plain:
            out_BHPD = _plain_attention(*padded)
        else:
            out_BHPD = functional.scaled_dot_product_attention(
                *padded, is_causal=True, enable_gqa=True
            )
        out_XHD = out_BHPD.transpose(1, 2).flatten(0, 1)
        return out_XHD if self._even else out_XHD[self._slot_T]

    def _pad(self, x_TXD: torch.Tensor) -> torch.Tensor:
        size = (len(self.lengths) * self.longest, *x_TXD.shape[1:])
        if not self._even:
            x_TXD = x_TXD.new_zeros(size).index_copy_(0, self._slot_T, x_TXD)
        return x_TXD.reshape(len(self.lengths), self.longest, *x_TXD.shape[1:]).transpose(1, 2)


def _plain_attention(
    q_BHPD: torch.Tensor, k_BKPD: torch.Tensor, v_BKPD: torch.Tensor
) -> torch.Tensor:
    """Causal attention as two products, the heads of a group side by side: for sequences of
    100 tokens four times as fast on a CPU, forward and backward, as the fused kernel."""
    sequences, heads, longest, head_dim = q_BHPD.shape
    kv_heads = k_BKPD.shape[1]
    grouped = (sequences, kv_heads, heads // kv_heads * longest, head_dim)
    scores = (q_BHPD * head_dim**-0.5).reshape(grouped) @ k_BKPD.transpose(-1, -2)
    later_PP = torch.ones(longest, longest, dtype=torch.bool, device=q_BHPD.device).triu(1)
    scores = scores.view(sequences, heads, longest, longest).masked_fill(later_PP, -torch.inf)
    weights = scores.softmax(-1).view(*grouped[:3], longest)
    out_BHPD: torch.Tensor = (weights @ v_BKPD).view(sequences, heads, longest, head_dim)
    return out_BHPD


def run_layers(
    decoder: Decoder,
    rows: Rows,
    hidden_TM: torch.Tensor,
    layers: range,
    *,
    want: Want = Want.CONTENT,
    see: See | None = None,
    probe: Probe | None = None,
    finish: bool = False,
) -> torch.Tensor:
    """Hidden states [T, M] behind `layers`; `see` gets what is wanted of routed layers.

    The last of `layers` is not finished when it is the last that `see` has to see, unless
    `finish` says so: nothing reads what leaves it then. Its hidden states are those that
    entered it.
    """
    cos_TD, sin_TD = decoder.rope.at(rows.position_T, rows.positions_end)
    routed = decoder.config.msa.routed_layers if see is not None else ()
    for index in layers:
        wanted = want if index in routed else Want.CONTENT
        projected = decoder.project(index, hidden_TM, cos_TD, sin_TD, wanted)
        if see is not None and index in routed:
            see(index, projected)
            if index == layers[-1] and probe is None and not finish:
                break
        attention_THD = rows.attend(projected.q_THD, projected.k_TKD, projected.v_TKD)
        hidden_TM = decoder.finish(index, hidden_TM, attention_THD, probe)
    return hidden_TM
