"""Routing records of a store without encryption, many at once.

numpy reads all headers together, and gathers all rows in a few calls that release the interpreter
for long; checksums are computed by `map`, which runs no bytecode between two of them: threads that
share this hardly ever wait for each other. What is not as usual (codecs, older or
younger formats, damage) is left to `storage.routing_pack`'s general way, which says what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from storage.codecs import Codec, raw_bytes
from storage.keys import Kind
from storage.layout import KVLayout
from storage.records import FORMAT_VERSION, HEADER_BYTES, MAGIC
from storage.store import CorruptRecordError

#: The plain header that `storage.records` draws; the checksum is over what comes before it.
_HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("kind", "u1"),
        ("codec", "u1"),
        ("zero", "u1"),
        ("fingerprint", "V16"),
        ("tokens", "<u4"),
        ("raw", "<u4"),
        ("stored", "<u4"),
        ("pad", "<u4"),
        ("checksum", "<u8"),
    ]
)
_CHECKED_BYTES = HEADER_BYTES - 8
#: Rows are gathered in pieces of at least this many bytes; smaller ones cost more than they save.
_SMALLEST_PIECE = 128

_Bytes = npt.NDArray[np.uint8]
_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PlainRun:
    """Records whose headers are as they should be; no checksum is verified yet.

    Valid as long as the records' views are. heads: of all, one behind the other. tokens_N: of the
    documents.
    """

    keys: Sequence[bytes]
    values: Sequence[memoryview]
    heads: bytes
    checksums: Sequence[int]
    tokens_N: _Counts

    @classmethod
    def of(
        cls, records: Sequence[tuple[bytes, memoryview]], mark: bytes, layout: KVLayout
    ) -> PlainRun | None:
        """mark: fingerprint of encoding and layout. None unless every record is plain, uncoded,
        of that mark, and as long as its tokens say."""
        values = [value for _, value in records]
        heads = b"".join([value[:HEADER_BYTES] for value in values])
        if not records or len(heads) != HEADER_BYTES * len(records):
            return None
        found = np.frombuffer(heads, _HEADER)
        tokens_N = found["tokens"].astype(np.int64)
        expected_N = layout.chunks_of(tokens_N) * raw_bytes(1, 1, layout)
        lengths_N = np.fromiter(map(len, values), np.int64, len(values))
        usual = (
            (found["magic"] == MAGIC)
            & (found["version"] == FORMAT_VERSION)
            & (found["kind"] == Kind.ROUTING)
            & (found["codec"] == Codec.RAW)
            & (found["zero"] == 0)
            & (found["fingerprint"] == np.void(mark))
            & (tokens_N > 0)
            & (found["raw"] == expected_N)
            & (found["stored"] == expected_N)
            & (found["pad"] == 0)
            & (lengths_N == HEADER_BYTES + expected_N)
        )
        if not usual.all():
            return None
        keys = [key for key, _ in records]
        return cls(keys, values, heads, found["checksum"].tolist(), tokens_N)

    def sums(self) -> Checksums:
        """What is to be verified of them."""
        heads, digest = self.heads, xxh3_64_intdigest
        starts = range(0, len(heads), HEADER_BYTES)
        seeds = [
            digest(key + heads[start : start + _CHECKED_BYTES])
            for key, start in zip(self.keys, starts, strict=True)
        ]
        bodies = [value[HEADER_BYTES:] for value in self.values]
        return Checksums(self.keys, bodies, seeds, self.checksums)


class Checksums(NamedTuple):
    """Of many records. bodies: what each is over, with the seed."""

    keys: Sequence[bytes]
    bodies: Sequence[memoryview]
    seeds: Sequence[int]
    expected: Sequence[int]

    def verify(self, first: int, last: int) -> None:
        """Raises CorruptRecordError unless the records from `first` up to `last` are as they were
        written. Holds the interpreter for a moment between two large ones only.
        """
        part = slice(first, last)
        found = list(map(xxh3_64_intdigest, self.bodies[part], self.seeds[part]))
        for place, (sum_, expected) in enumerate(zip(found, self.expected[part], strict=True)):
            if sum_ != expected:
                raise CorruptRecordError(
                    f"{self.keys[first + place].hex()}: checksum does not match"
                )


class Gathering:
    """Copies the keys of many records, layer by layer, in one call for as many layers as wanted.

    All values of a transaction lie in one map, and large ones begin on pages of their own: so
    all lie in whole pieces of that stretch of memory, and a table of pieces says where.
    Shape suffixes beside those of `storage.layout`: R pieces of a layer, P bytes of a piece.
    """

    def __init__(self, stretch_XP: _Bytes, firsts_N: _Counts, counts_N: _Counts) -> None:
        """firsts_N: pieces where records begin. counts_N: pieces of a layer of theirs."""
        self._stretch_XP = stretch_XP
        ends_N = np.cumsum(counts_N)
        within_R = np.arange(ends_N[-1]) - np.repeat(ends_N - counts_N, counts_N)
        self._first_R = np.repeat(firsts_N, counts_N) + within_R
        self._step_R = np.repeat(counts_N, counts_N)

    @classmethod
    def of(cls, bodies: Sequence[memoryview], layers: int, chunk_bytes: int) -> Gathering | None:
        """bodies: [L, C, E] each. None where pieces would be small: records that share a page
        with others begin anywhere."""
        arrays = [np.frombuffer(body, np.uint8) for body in bodies]
        places_N = np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)
        sizes_N = np.array([len(body) for body in bodies], np.int64)
        first = int(places_N.argmin())
        starts_N = places_N - places_N[first]
        piece = int(np.gcd.reduce(starts_N, initial=chunk_bytes))
        if piece < _SMALLEST_PIECE:
            return None
        shape = int((starts_N + sizes_N).max()) // piece, piece
        # What lies between the records is not ours to read, and is not read.
        stretch_XP = np.lib.stride_tricks.as_strided(
            arrays[first], shape, (piece, 1), writeable=False
        )
        return cls(stretch_XP, starts_N // piece, sizes_N // (layers * piece))

    def copy(self, packed_LB: _Bytes, first: int, last: int) -> None:
        """The layers from `first` up to `last` into [L, bytes of a layer]."""
        places_lR = self._first_R + np.arange(first, last)[:, None] * self._step_R
        out = packed_LB[first:last].reshape(-1, self._stretch_XP.shape[1])
        # Clipped, as numpy would else gather in a buffer of its own.
        np.take(self._stretch_XP, places_lR.reshape(-1), axis=0, out=out, mode="clip")
