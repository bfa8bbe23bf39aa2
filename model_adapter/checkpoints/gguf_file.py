"""Reading GGUF files (versions 2 and 3, little-endian) within bounds.

The `gguf` package has the constants and the dequantisation that are used here; its reader is
not, because it takes every length in the file at its word. Here a length is compared with what
is left of the file before anything is allocated, and tensors must lie apart inside the file,
so memory stays proportional to the file's size.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize

from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    InvalidConfigError,
    UnsupportedCheckpointError,
)

MAX_ENTRIES = 4096
MAX_TENSORS = 65536
MAX_NAME_BYTES = 256
MAX_STRING_BYTES = 1 << 20
MAX_HEADER_BYTES = 256 << 20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

#: struct codes of the scalar value types.
_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape rows first, as numpy has it; offset from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GgufFile:
    """An open GGUF file: metadata by key, tensors by name. A context manager.

    Raises CheckpointNotFoundError, CorruptFileError, UnsupportedCheckpointError.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointNotFoundError(f"no file {path}")
        self.name = path.name
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._file = path.open("rb")
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._left = min(self._size, MAX_HEADER_BYTES)
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def get(self, key: str, *kinds: type, default: Any = None) -> Any:
        """A metadata value of one of `kinds`.

        Raises InvalidConfigError for another type, or when it is missing without a default.
        """
        value = self.metadata.get(key, default)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidConfigError(f"{self.name}: {key} is {value!r:.60}, expected {names}")
        return value

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor, dequantised. Raises UnsupportedCheckpointError, CorruptFileError."""
        info = self.tensors[name]
        self._file.seek(info.offset)
        raw = np.empty(info.size, dtype=np.uint8)
        if self._file.readinto(raw.data) != info.size:
            raise self._corrupt(f"it ends within tensor {name}")
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * block_bytes)
        try:
            # Damaged scales overflow; the caller looks for values that are not finite.
            with np.errstate(all="ignore"):
                values = dequantize(rows, info.kind)
        except NotImplementedError as error:
            raise UnsupportedCheckpointError(
                f"{self.name}: tensor {name} is {info.kind.name}, which cannot be read"
            ) from error
        return np.asarray(values, dtype=np.float32).reshape(info.shape)

    def _corrupt(self, problem: str) -> CorruptFileError:
        return CorruptFileError(f"{self.name}: {problem}")

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise self._corrupt(f"{count} bytes are announced where {self._left} are left")
        content = self._file.read(count)
        if len(content) != count:
            raise self._corrupt("it is truncated")
        self._left -= count
        return content

    def _number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self._take(layout.size))[0]

    def _string(self, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            raise self._corrupt(f"a string of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._corrupt("a string is not UTF-8") from error

    def _array(self) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == GGUFValueType.STRING:
            # Each string takes eight bytes at least, so the list cannot outgrow the file.
            if count * 8 > self._left:
                raise self._corrupt(f"an array of {count} strings")
            return [self._string(MAX_STRING_BYTES) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._corrupt(f"an array of type {kind}")
        content = self._take(count * struct.calcsize("<" + _SCALARS[kind]))
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", content))

    def _value(self) -> Value:
        kind = self._number("I")
        if kind == GGUFValueType.STRING:
            return self._string(MAX_STRING_BYTES)
        if kind == GGUFValueType.ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._corrupt(f"a value of type {kind}")
        value: Value = self._number(_SCALARS[kind])
        return value

    def _read_header(self) -> None:
        if self._take(4) != struct.pack("<I", GGUF_MAGIC):
            raise self._corrupt("it is not a GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise UnsupportedCheckpointError(
                f"{self.name}: GGUF version {version}; 2 and 3 (little-endian) are read"
            )
        tensors, entries = self._number("Q"), self._number("Q")
        if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
            raise self._corrupt(f"{tensors} tensors and {entries} metadata entries are announced")
        for _ in range(entries):
            key = self._string(MAX_NAME_BYTES)
            if key in self.metadata:
                raise self._corrupt(f"metadata key {key!r} stands twice")
            self.metadata[key] = self._value()
        found = [self._tensor() for _ in range(tensors)]
        alignment = self.get("general.alignment", int, default=GGUF_DEFAULT_ALIGNMENT)
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._corrupt(f"an alignment of {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        self._place(found, start, alignment)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(MAX_NAME_BYTES)
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _place(
        self, found: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> None:
        """Checks that tensors lie inside the file, one after another, and keeps them by name."""
        end = start
        for name, shape, number, offset in sorted(found, key=lambda tensor: tensor[3]):
            try:
                kind = GGMLQuantizationType(number)
            except ValueError as error:
                raise UnsupportedCheckpointError(
                    f"{self.name}: tensor {name!r} is of the unknown type {number}"
                ) from error
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if min(shape) < 1 or shape[-1] % block:
                raise self._corrupt(f"tensor {name!r} has the shape {list(shape)}")
            size = math.prod(shape) // block * block_bytes
            first = start + offset
            if offset % alignment or first < end or first + size > self._size:
                raise self._corrupt(f"tensor {name!r} does not lie where the file says")
            if name in self.tensors:
                raise self._corrupt(f"tensor {name!r} stands twice")
            self.tensors[name] = TensorInfo(name, shape, kind, first, size)
            end = first + size
