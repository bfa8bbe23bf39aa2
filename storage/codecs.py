"""Codecs: how arrays and texts become payload bytes, one id byte per record.

  id  name        what                                              lossy
  0   RAW         the array's bytes                                 no
  1   ZSTD        one zstd frame of them, level 1                   no
  2   INT8        per vector of head_dim: one bf16 scale, then int8 yes
  3   INT8_ZSTD   one zstd frame of INT8                            yes

RAW is the default: zstd saves about a fifth on bf16 and decodes slower than
memory copies. INT8 takes 0.52 of RAW at a relative RMS error near 0.01. Its scale is
per vector (chunk, layer, head), because most documents have a few chunks, where one
scale per channel would cost more than it saves. INT8 of INT8 is not the same
bytes again; archives carry decoded arrays.

Decompression is bounded: a frame must state its content size, and state the one
that the caller expects.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import zstandard

from storage.layout import NUMPY_DTYPE, Bits, KVLayout, LayoutError
from storage.records import Buffer

_LEVEL = 1
_INT8_MAX = 127
_BF16_MAX = np.array([0x7F7F << 16], np.uint32).view(np.float32)[0]


class Codec(IntEnum):
    """Id byte of a record. Numbers are never reused."""

    RAW = 0
    ZSTD = 1
    INT8 = 2
    INT8_ZSTD = 3


_KNOWN = frozenset(codec.value for codec in Codec)
_QUANTISED = frozenset((Codec.INT8.value, Codec.INT8_ZSTD.value))
_COMPRESSED = frozenset((Codec.ZSTD.value, Codec.INT8_ZSTD.value))


class CodecError(ValueError):
    """A payload that its codec did not make, or not of the expected size."""


class Zstd:
    """Makes and reads zstd frames, one after another: not in two threads at once.

    Making its contexts takes fifteen times as long as a conversation's turn does, so many texts
    share one. They hold parts of the last text: let it go with the last of them.
    """

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, data: Buffer) -> bytes:
        """One zstd frame that states its content size and carries a checksum."""
        return self._compressor.compress(data)

    def decompress(self, data: Buffer, raw_bytes: int) -> bytes:
        """Content of one frame of exactly `raw_bytes`; allocates no more. Raises CodecError."""
        if (stated := frame_bytes(data)) != raw_bytes:
            raise CodecError(f"the zstd frame holds {stated} bytes, expected {raw_bytes}")
        try:
            content = self._decompressor.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(f"zstd: {error}") from None
        if len(content) != raw_bytes:
            raise CodecError(f"the zstd frame gave {len(content)} bytes, expected {raw_bytes}")
        return content


def compress(data: Buffer) -> bytes:
    """See Zstd.compress."""
    return Zstd().compress(data)


def frame_bytes(data: Buffer) -> int:
    """Content size that a frame states. Raises CodecError when it states none."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
    except zstandard.ZstdError as error:
        raise CodecError(f"no zstd frame: {error}") from None
    if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise CodecError("the zstd frame does not state its size")
    return size


def decompress(data: Buffer, raw_bytes: int) -> bytes:
    """See Zstd.decompress."""
    return Zstd().decompress(data, raw_bytes)


def encode_arrays(codec: Codec, arrays: list[Bits], layout: KVLayout) -> bytes:
    """Payload of [L, C, E] arrays, one behind the other.

    Raises LayoutError when INT8 is asked of values that are not finite.
    """
    if codec in _QUANTISED:
        raw = b"".join(_quantise(array, layout) for array in arrays)
    else:
        raw = b"".join(np.ascontiguousarray(array).data for array in arrays)
    return compress(raw) if codec in _COMPRESSED else raw


def decode_arrays(
    codec: int, payload: memoryview, count: int, chunks: int, layout: KVLayout
) -> list[Bits]:
    """`count` new [L, C, E] arrays, C = `chunks`. Raises CodecError."""
    if codec not in _KNOWN:
        raise CodecError(f"unknown codec {codec}")
    shape = (len(layout.routed_layers), chunks, layout.width)
    values = shape[0] * chunks * shape[2]
    quantised = codec in _QUANTISED
    item = NUMPY_DTYPE[layout.dtype].itemsize
    size = values + 2 * (values // layout.head_dim) if quantised else values * item
    compressed = codec in _COMPRESSED
    raw = _writable(decompress(payload, count * size) if compressed else payload)
    if len(raw) != count * size:
        raise CodecError(f"payload of {len(raw)} bytes, layout says {count * size}")
    parts = (memoryview(raw)[i * size : (i + 1) * size] for i in range(count))
    if quantised:
        return [_restore(part, shape, layout) for part in parts]
    return [_view(part, layout).reshape(shape) for part in parts]


def _writable(payload: Buffer) -> Buffer:
    """The payload itself where it was decrypted into its own buffer, else a copy of it."""
    view = memoryview(payload)
    return bytearray(payload) if view.readonly else view


def _view(part: Buffer, layout: KVLayout) -> Bits:
    if layout.dtype == "bf16":
        return np.frombuffer(part, np.uint16)
    return np.frombuffer(part, np.float32)


def raw_bytes(count: int, chunks: int, layout: KVLayout) -> int:
    """Bytes of `count` decoded [L, C, E] arrays."""
    values = len(layout.routed_layers) * chunks * layout.width
    return count * values * NUMPY_DTYPE[layout.dtype].itemsize


def to_float(bits: Bits) -> npt.NDArray[np.float32]:
    """Values of an array that may hold bf16 as its bits."""
    if bits.dtype == np.float32:
        return bits.view(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """bf16 bits of finite values, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _quantise(array: Bits, layout: KVLayout) -> bytes:
    vectors = to_float(array).reshape(-1, layout.head_dim)
    if not np.isfinite(vectors).all():
        raise LayoutError("int8 holds finite values only")
    peak = np.abs(vectors).max(axis=1)
    # The scale is rounded up, so that the largest value never leaves int8.
    exact = (peak / _INT8_MAX).astype(np.float32).view(np.uint32)
    scale_bits: npt.NDArray[np.uint16] = ((exact + 0xFFFF) >> 16).astype(np.uint16)
    scale = to_float(scale_bits)
    scale[scale == 0] = 1
    levels = np.clip(np.rint(vectors / scale[:, None]), -_INT8_MAX, _INT8_MAX).astype(np.int8)
    return bytes(scale_bits.tobytes() + levels.tobytes())


def _restore(part: memoryview, shape: tuple[int, int, int], layout: KVLayout) -> Bits:
    vectors = shape[0] * shape[1] * layout.kv_heads
    scale = to_float(np.frombuffer(part[: 2 * vectors], np.uint16))
    if not np.isfinite(scale).all():
        raise CodecError("a scale of int8 is not finite")
    levels = np.frombuffer(part[2 * vectors :], np.int8).reshape(vectors, layout.head_dim)
    with np.errstate(over="ignore"):  # Rounding at the top of the range: clipped below.
        values = levels.astype(np.float32) * scale[:, None]
    np.clip(values, -_BF16_MAX, _BF16_MAX, out=values)
    if layout.dtype == "fp32":
        return values.reshape(shape)
    return to_bf16(values).reshape(shape)
