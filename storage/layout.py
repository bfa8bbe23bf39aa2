"""Shapes of stored KV: what a model's blocks look like, and one document's block.

Shape suffixes used in names here and in `model_adapter`:
  L routed layers, C chunks, K kv heads, D head dim, E = K * D.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Dtype = Literal["bf16", "fp32"]

#: How a dtype is held in numpy: bf16 has no numpy type, so its bits are uint16.
NUMPY_DTYPE: dict[Dtype, np.dtype[np.uint16] | np.dtype[np.float32]] = {
    "bf16": np.dtype("<u2"),
    "fp32": np.dtype("<f4"),
}

#: All ones: infinite, or no number.
_BF16_EXPONENT = np.uint16(0x7F80)

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.float32]


class LayoutError(ValueError):
    """An array or a record does not have the shape its layout says."""


class LayoutFields(Protocol):
    """A layout as a message has it; see KVLayout."""

    @property
    def routed_layers(self) -> Iterable[int]:
        """Layer indices, ascending."""

    kv_heads: int
    head_dim: int
    pool_tokens: int
    dtype: str
    separate_routing_keys: bool


@dataclass(frozen=True)
class KVLayout:
    """Shape of the stored KV of one model.

    routed_layers: layer indices, ascending. pool_tokens: tokens per chunk.
    separate_routing_keys: False when the model routes with its content keys, so
    that a block stores them once.
    """

    routed_layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    pool_tokens: int
    dtype: Dtype
    separate_routing_keys: bool

    @classmethod
    def of(cls, fields: LayoutFields) -> KVLayout:
        """Raises LayoutError for a dtype that is not known here."""
        for dtype in NUMPY_DTYPE:
            if fields.dtype == dtype:
                return cls(
                    routed_layers=tuple(fields.routed_layers),
                    kv_heads=fields.kv_heads,
                    head_dim=fields.head_dim,
                    pool_tokens=fields.pool_tokens,
                    dtype=dtype,
                    separate_routing_keys=fields.separate_routing_keys,
                )
        raise LayoutError(f"unknown dtype {fields.dtype!r}; known are {', '.join(NUMPY_DTYPE)}")

    @property
    def width(self) -> int:
        """E: values of one chunk, one layer, one kind."""
        return self.kv_heads * self.head_dim

    def chunks(self, tokens: int) -> int:
        """Chunks of a document of `tokens` tokens; the last may be short."""
        return -(-tokens // self.pool_tokens)

    def chunks_of(self, tokens_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """As `chunks`, of many documents."""
        return -(-tokens_N // self.pool_tokens)

    def kinds(self) -> int:
        """Arrays per block: routing key, value and, when separate, key."""
        return 3 if self.separate_routing_keys else 2

    def block_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed block of a document of `tokens` tokens."""
        values = len(self.routed_layers) * self.chunks(tokens) * self.width
        return self.kinds() * values * NUMPY_DTYPE[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class KVBlock:
    """Compressed KV of one document under one model (paper section 3.2).

    Arrays are [L, C, E], bf16 as uint16 bits. key_LCE is None exactly when the
    layout has no separate routing keys: routing_key_LCE then is the key.
    """

    number: int
    tokens: int
    routing_key_LCE: Bits
    key_LCE: Bits | None
    value_LCE: Bits

    def validate(self, layout: KVLayout) -> None:
        """Raises LayoutError unless every array has exactly the layout's shape and type, and
        finite numbers only: one that is none would spoil whatever it is multiplied with."""
        if self.tokens < 1:
            raise LayoutError(f"document {self.number}: {self.tokens} tokens")
        if (self.key_LCE is None) == layout.separate_routing_keys:
            raise LayoutError(f"document {self.number}: key array does not fit the layout")
        shape = (len(layout.routed_layers), layout.chunks(self.tokens), layout.width)
        for name in ("routing_key_LCE", "key_LCE", "value_LCE"):
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape or array.dtype != NUMPY_DTYPE[layout.dtype]:
                raise LayoutError(
                    f"document {self.number}: {name} is {array.dtype}{array.shape}, "
                    f"layout says {layout.dtype}{shape}"
                )
            if not _finite(array):
                raise LayoutError(f"document {self.number}: {name} holds what is no finite number")


def _finite(array: Bits) -> bool:
    if array.dtype == NUMPY_DTYPE["bf16"]:
        exponents = array.view(np.uint16) & _BF16_EXPONENT
        return not (exponents == _BF16_EXPONENT).any()
    return bool(np.isfinite(array).all())
