"""Routing keys of one layer in the formats that kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

#: Largest magnitudes of quantised keys.
INT8_MAX, INT4_MAX = 127, 7
#: Dimensions that share a scale, at most: kernels add up their products in 32 bits.
MOST_GROUP = 512


class KeyFormat(Enum):
    """How one dimension of a key is stored. Bits: 16 or 32, 8, 4 and scales beside them."""

    FLOAT = "float"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, eq=False)
class RoutingKeys:
    """Keys of all chunks of a memory in one layer, contiguous.

    FLOAT: values_CE in bf16, fp16 or fp32. INT8: int8 [C, E]. INT4: uint8 [C, E / 2], byte
    j of a group holding its dimension j (low half) and j + group / 2 (high half), each
    plus 8. scale_CS: fp32, a key's dimension is its integer times its group's scale.
    """

    format: KeyFormat
    values_CE: torch.Tensor
    scale_CS: torch.Tensor | None
    group: int

    @property
    def chunks(self) -> int:
        """C."""
        return self.values_CE.shape[0]

    @property
    def width(self) -> int:
        """E."""
        return self.values_CE.shape[1] * (2 if self.format is KeyFormat.INT4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, scales included."""
        scale = 0 if self.scale_CS is None else self.scale_CS.nbytes
        return self.values_CE.nbytes + scale

    def dequantised(self) -> torch.Tensor:
        """fp32 [C, E]."""
        if self.scale_CS is None:
            return self.values_CE.float()
        groups_CSG = self.integers().float().view(self.chunks, -1, self.group)
        return (groups_CSG * self.scale_CS[:, :, None]).flatten(1)

    def integers(self) -> torch.Tensor:
        """int8 [C, E] of a quantised format."""
        if self.format is KeyFormat.INT8:
            return self.values_CE
        packed_CSH = self.values_CE.view(self.chunks, -1, self.group // 2)
        halves = (packed_CSH & 15, packed_CSH >> 4)
        return (torch.cat(halves, dim=-1).to(torch.int8) - 8).flatten(1)


@dataclass(frozen=True, eq=False)
class KeyStack:
    """Keys of consecutive documents in all routed layers, with room for more chunks.

    values_LCE, scale_LCS: as in RoutingKeys, [L, capacity, ...].
    """

    format: KeyFormat
    values_LCE: torch.Tensor
    scale_LCS: torch.Tensor | None
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes on the device, scales and unused room included."""
        scale = 0 if self.scale_LCS is None else self.scale_LCS.nbytes
        return self.values_LCE.nbytes + scale

    def layer(self, layer: int, first: int = 0, stop: int | None = None) -> RoutingKeys:
        """Keys of one layer, of chunks first to stop."""
        scale_CS = None if self.scale_LCS is None else self.scale_LCS[layer, first:stop]
        return RoutingKeys(self.format, self.values_LCE[layer, first:stop], scale_CS, self.group)


@dataclass(frozen=True)
class KeyStorage:
    """How routing keys are held: format and dimensions that share a scale.

    exact: a copy in the layout's own type lies in host RAM, to score the best again.
    """

    format: KeyFormat = KeyFormat.FLOAT
    group: int = 0
    exact: bool = False

    def chunk_bytes(self, width: int, item_bytes: int) -> int:
        """On the device, of one chunk in one layer. item_bytes: of a FLOAT dimension."""
        if self.format is KeyFormat.FLOAT:
            return width * item_bytes
        scales = width // self.group * torch.float32.itemsize
        return width // (1 if self.format is KeyFormat.INT8 else 2) + scales

    def empty(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KeyStack:
        """Room for [L, capacity, E] keys."""
        layers, capacity, width = shape
        if self.format is KeyFormat.FLOAT:
            values = torch.empty(shape, dtype=dtype, device=device)
            return KeyStack(self.format, values, None, self.group or width)
        packed, kind = (
            (width, torch.int8) if self.format is KeyFormat.INT8 else (width // 2, torch.uint8)
        )
        values = torch.empty(layers, capacity, packed, dtype=kind, device=device)
        scale = torch.empty(layers, capacity, width // self.group, device=device)
        return KeyStack(self.format, values, scale, self.group)

    def stack(self, keys_LCE: torch.Tensor) -> KeyStack:
        """Keys [L, C, E] in this format, where they lie."""
        layers, chunks, width = keys_LCE.shape
        flat = quantise(keys_LCE.flatten(0, 1), self.format, self.group or width)
        scale = None if flat.scale_CS is None else flat.scale_CS.view(layers, chunks, -1)
        return KeyStack(
            self.format, flat.values_CE.view(layers, chunks, -1), scale, self.group or width
        )


def floats(keys_CE: torch.Tensor, group: int) -> RoutingKeys:
    """Keys as they are. group: dimensions that are multiplied at once, a divisor of E."""
    return RoutingKeys(KeyFormat.FLOAT, _whole_groups(keys_CE, group), None, group)


def quantise(keys_CE: torch.Tensor, to: KeyFormat, group: int) -> RoutingKeys:
    """Rounds to the nearest integer of `to`, symmetric, one scale per chunk and `group`
    consecutive dimensions (a head, say). FLOAT keeps the keys as they are.

    Raises ValueError when E is not whole groups, or these are of more than MOST_GROUP.
    """
    if to is KeyFormat.FLOAT:
        return floats(keys_CE, group)
    if group > MOST_GROUP:
        raise ValueError(f"a scale for {group} dimensions; {MOST_GROUP} may share one")
    largest = INT8_MAX if to is KeyFormat.INT8 else INT4_MAX
    groups_CSG = _whole_groups(keys_CE, group).float().view(keys_CE.shape[0], -1, group)
    scale_CS = groups_CSG.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny) / largest
    integers_CSG = (groups_CSG / scale_CS[:, :, None]).round_().to(torch.int8)
    if to is KeyFormat.INT8:
        return RoutingKeys(to, integers_CSG.flatten(1), scale_CS, group)
    raised_CSG = (integers_CSG + 8).to(torch.uint8)
    low_CSH, high_CSH = raised_CSG.chunk(2, dim=-1)
    return RoutingKeys(to, (low_CSH | (high_CSH << 4)).flatten(1).contiguous(), scale_CS, group)


def _whole_groups(keys_CE: torch.Tensor, group: int) -> torch.Tensor:
    width = keys_CE.shape[1]
    if group < 1 or width % group or group & (group - 1):
        raise ValueError(f"{width} dimensions are not whole groups of {group}, a power of two")
    return keys_CE.contiguous()
