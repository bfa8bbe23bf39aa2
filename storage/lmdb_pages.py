"""Brings a key range of an LMDB file into the page cache by large sequential reads.

Reading through the map faults page by page, at a fiftieth of what the disk gives
(one value of 256 KiB: 64 faults). This walks the B-tree of the file itself, by
`pread`, finds where the values of a range lie, and reads those extents in order.
It is advice and nothing else: the bytes are thrown away, a page that makes no
sense (the writer may be reusing it) ends that branch of the walk, and every record
is read and verified through LMDB afterwards.

LMDB 0.9 format, little-endian, 64-bit: page header 16 bytes (pgno u64, pad u16,
flags u16, lower u16, upper u16), then u16 offsets of nodes; a node is lo u16, hi
u16, flags u16, key size u16, key, data. A branch's lo|hi|flags is its child's page;
a leaf's lo|hi is the value's size and, with flag 1, its data the first overflow page.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from storage.keys import KeyRange

#: No more than this is brought in at a time: it would only evict itself.
MAX_PREFETCH_BYTES = 8 * 2**30

_MAGIC = 0xBEEFC0DE
_VERSION = 1
_META = struct.Struct("<16xII16xI")  # magic, version, (address, map size,) page size
_ROOT_OFFSET = 128
_TXNID_OFFSET = 144
_BRANCH, _LEAF = 0x01, 0x02
_BIG_DATA = 0x01
_HEADER = 16
_NODE = 8
_MAX_DEPTH = 32
_READ_BYTES = 8 * 2**20
_GAP_BYTES = 256 * 1024
_SAMPLES = 16
_NO_PAGE = 2**64 - 1

_Extent = tuple[int, int]


def prefetch(folder: Path, span: KeyRange) -> int:
    """Reads what the range's values occupy, unless samples of it are cached. Returns bytes read."""
    try:
        descriptor = os.open(folder / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return _prefetch(_File(descriptor), span)
    except (OSError, OverflowError, struct.error, IndexError):
        return 0  # The file is being changed, or is none of ours: LMDB will say so.
    finally:
        os.close(descriptor)


class _File:
    """Pages of an LMDB file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.page_bytes = 4096
        self._walked: set[int] = set()
        magic, version, page_bytes = _META.unpack_from(self.page(0))
        if magic != _MAGIC or version != _VERSION or page_bytes.bit_count() != 1:
            raise OSError("not an LMDB 0.9 file")
        self.page_bytes = page_bytes

    def page(self, number: int) -> bytes:
        """One page; short at the end of the file."""
        return os.pread(self.descriptor, self.page_bytes, number * self.page_bytes)

    def root(self) -> int:
        """Root page of the newer meta page's tree."""
        metas = [self.page(0), self.page(1)]
        newest = max(metas, key=lambda page: struct.unpack_from("<Q", page, _TXNID_OFFSET))
        (root,) = struct.unpack_from("<Q", newest, _ROOT_OFFSET)
        return int(root)

    def nodes(self, page: bytes, kind: int) -> Iterator[tuple[int, int, int, int]]:
        """(offset, size or low page bits, flags, key size) of the nodes of a page of `kind`."""
        flags, lower = struct.unpack_from("<HH", page, 10)
        if not flags & kind or not _HEADER <= lower <= len(page):
            return
        count = (lower - _HEADER) // 2
        for offset in struct.unpack_from(f"<{count}H", page, _HEADER):
            low, high, node_flags, key_size = struct.unpack_from("<4H", page, offset)
            yield offset, low | high << 16, node_flags, key_size

    def leaves(self, number: int, span: KeyRange, depth: int = 0) -> Iterator[int]:
        """Page numbers of the leaves that may hold keys of the range, in key order."""
        if number in self._walked or depth > _MAX_DEPTH:
            return  # A page that was reused under us may point back.
        self._walked.add(number)
        page = self.page(number)
        if struct.unpack_from("<H", page, 10)[0] & _LEAF:
            yield number
            return
        children: list[tuple[bytes, int]] = []
        for offset, low, flags, key_size in self.nodes(page, _BRANCH):
            key = page[offset + _NODE : offset + _NODE + key_size]
            children.append((key, low | flags << 32))
        for index, (key, child) in enumerate(children):
            # The first key of a branch is empty, which is below every other.
            below = index + 1 < len(children) and children[index + 1][0] <= span.first
            if not below and key <= span.last:
                yield from self.leaves(child, span, depth + 1)

    def extents(self, leaf: int) -> Iterator[_Extent]:
        """(offset, bytes) in the file of the big values of one leaf."""
        page = self.page(leaf)
        for offset, size, flags, key_size in self.nodes(page, _LEAF):
            if flags & _BIG_DATA:
                (first,) = struct.unpack_from("<Q", page, offset + _NODE + key_size)
                yield first * self.page_bytes, _HEADER + size

    def cached(self, extent: _Extent) -> bool:
        """True when the extent's last page is in the page cache."""
        try:
            buffer = bytearray(1)
            return os.preadv(self.descriptor, [buffer], sum(extent) - 1, os.RWF_NOWAIT) == 1
        except OSError:
            return False


def _prefetch(file: _File, span: KeyRange) -> int:
    root = file.root()
    if root == _NO_PAGE or span.last < span.first:
        return 0
    leaves = list(file.leaves(root, span))
    step = max(1, len(leaves) // _SAMPLES)
    samples = [next(file.extents(leaf), None) for leaf in leaves[::step]]
    if all(sample is None or file.cached(sample) for sample in samples):
        return 0
    buffer = bytearray(_READ_BYTES)
    done = 0
    for start, end in _merged(extent for leaf in leaves for extent in file.extents(leaf)):
        for offset in range(start, end, _READ_BYTES):
            part = memoryview(buffer)[: min(_READ_BYTES, end - offset)]
            read = os.preadv(file.descriptor, [part], offset)
            done += read
            if read < len(part) or done >= MAX_PREFETCH_BYTES:
                return done
    return done


def _merged(extents: Iterator[_Extent]) -> Iterator[tuple[int, int]]:
    """Start and end of runs in file order; what lies close is read in one go."""
    start = end = -1
    for offset, size in sorted(extents):
        if start < 0:
            start, end = offset, offset + size
        elif offset - end <= _GAP_BYTES:
            end = max(end, offset + size)
        else:
            yield start, end
            start, end = offset, offset + size
    if start >= 0:
        yield start, end
