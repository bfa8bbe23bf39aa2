"""One blocks member: a run of one encoding's blocks as a safetensors file.

Tensors, N documents with C chunks in all: numbers I64 [N], tokens I64 [N],
routing_key [L, C, E], key [L, C, E] where the layout has one, value [L, C, E], BF16
or F32. Documents lie behind each other along C. Written and parsed here,
because the format is small and a parser that expects exactly these tensors is
easier to trust than one that takes any; the safetensors library reads it too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from storage.archive.errors import ArchiveCorruptError
from storage.document_json import DocumentFormatError, Fields, dump_json, load_json
from storage.keys import MAX_NUMBER
from storage.layout import Bits, KVBlock, KVLayout, LayoutError

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 4096
_MAX_TOKENS = 2**32 - 1
_ALIGN = 8
_NAMES = {"bf16": "BF16", "fp32": "F32"}
_TYPES: dict[str, npt.DTypeLike] = {"I64": np.int64, "BF16": np.uint16, "F32": np.float32}


class _Slice(NamedTuple):
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_blocks(layout: KVLayout, blocks: Sequence[KVBlock]) -> bytes:
    """A safetensors file of at least one block. Raises LayoutError."""
    for block in blocks:
        block.validate(layout)
    name = _NAMES[layout.dtype]
    tensors: list[tuple[str, str, npt.NDArray[np.generic]]] = [
        ("numbers", "I64", np.array([block.number for block in blocks], np.int64)),
        ("tokens", "I64", np.array([block.tokens for block in blocks], np.int64)),
        ("routing_key", name, _joined([block.routing_key_LCE for block in blocks])),
        ("value", name, _joined([block.value_LCE for block in blocks])),
    ]
    if layout.separate_routing_keys:
        keys = [block.key_LCE for block in blocks if block.key_LCE is not None]
        tensors.insert(3, ("key", name, _joined(keys)))
    header: dict[str, object] = {}
    begin = 0
    for tensor, dtype, array in tensors:
        end = begin + array.nbytes
        header[tensor] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = dump_json(header)
    text += b" " * (-len(text) % _ALIGN)
    return b"".join((_LENGTH.pack(len(text)), text, *(array.data for *_, array in tensors)))


def _joined(arrays: Sequence[Bits]) -> npt.NDArray[np.generic]:
    return cast(npt.NDArray[np.generic], np.concatenate(arrays, axis=1))


def decode_blocks(layout: KVLayout, data: bytes) -> Iterator[KVBlock]:
    """The blocks of one member. Raises ArchiveCorruptError before the first is given."""
    try:
        tensors = _parse(layout, data)
    except DocumentFormatError as error:
        raise ArchiveCorruptError(f"blocks: {error}") from error
    numbers, tokens = tensors["numbers"].tolist(), tensors["tokens"].tolist()
    if any(not 1 <= number <= MAX_NUMBER for number in numbers):
        raise ArchiveCorruptError("blocks: a document number is out of range")
    if any(not 1 <= count <= _MAX_TOKENS for count in tokens):
        raise ArchiveCorruptError("blocks: a token count is out of range")
    chunks = sum(layout.chunks(count) for count in tokens)
    arrays = {name: tensors[name] for name in ("routing_key", "key", "value") if name in tensors}
    for name, array in arrays.items():
        if array.shape != (len(layout.routed_layers), chunks, layout.width):
            raise ArchiveCorruptError(f"blocks: {name} does not have the layout's shape")
    return _blocks(layout, numbers, tokens, cast(dict[str, Bits], arrays))


def _blocks(
    layout: KVLayout, numbers: list[int], tokens: list[int], arrays: dict[str, Bits]
) -> Iterator[KVBlock]:
    start = 0
    for number, count in zip(numbers, tokens, strict=True):
        end = start + layout.chunks(count)
        own = {name: array[:, start:end].copy() for name, array in arrays.items()}
        start = end
        block = KVBlock(number, count, own["routing_key"], own.get("key"), own["value"])
        try:
            block.validate(layout)
        except LayoutError as error:
            raise ArchiveCorruptError(str(error)) from error
        yield block


def _parse(layout: KVLayout, data: bytes) -> dict[str, npt.NDArray[np.generic]]:
    if len(data) < _LENGTH.size:
        raise DocumentFormatError("no safetensors file")
    (length,) = _LENGTH.unpack_from(data)
    if not length <= min(_MAX_HEADER, len(data) - _LENGTH.size):
        raise DocumentFormatError("the header's length does not fit")
    body = memoryview(data)[_LENGTH.size + length :]
    fields = Fields(load_json(data[_LENGTH.size : _LENGTH.size + length]), "header")
    kinds = ["routing_key", "key", "value"] if layout.separate_routing_keys else None
    names = ["numbers", "tokens", *(kinds or ["routing_key", "value"])]
    slices = {name: _parse_slice(fields.child(name), len(body)) for name in names}
    fields.close()
    position = 0
    for part in sorted(slices.values(), key=lambda part: (part.begin, part.end)):
        if part.begin != position:
            raise DocumentFormatError("tensors overlap or leave gaps")
        position = part.end
    if position != len(body):
        raise DocumentFormatError("bytes belong to no tensor")
    return {name: _tensor(layout, name, part, body) for name, part in slices.items()}


def _parse_slice(fields: Fields, limit: int) -> _Slice:
    def integer(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise DocumentFormatError("a shape or an offset is out of range")
        return value

    dtype = fields.text("dtype")
    shape = fields.items("shape", integer)
    offsets = fields.items("data_offsets", integer)
    fields.close()
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DocumentFormatError("data_offsets is no range")
    return _Slice(dtype, shape, *offsets)


def _tensor(layout: KVLayout, name: str, part: _Slice, body: memoryview) -> npt.NDArray[np.generic]:
    vector = name in ("numbers", "tokens")
    if part.dtype != ("I64" if vector else _NAMES[layout.dtype]):
        raise DocumentFormatError(f"{name} is of type {part.dtype[:20]!r}")
    if len(part.shape) != (1 if vector else 3):
        raise DocumentFormatError(f"{name} has {len(part.shape)} dimensions")
    dtype = np.dtype(_TYPES[part.dtype])
    size = dtype.itemsize
    for extent in part.shape:
        size *= extent  # Python's integers do not overflow.
    if size != part.end - part.begin:
        raise DocumentFormatError(f"{name} has another size than its shape")
    array = np.frombuffer(body[part.begin : part.end], dtype)
    return cast(npt.NDArray[np.generic], array.reshape(part.shape))
