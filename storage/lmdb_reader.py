"""Reading a tenant's environment: in the writer's process or in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from storage.block_records import (
    Record,
    open_block,
    read_content,
    read_document,
    read_encoding,
    read_routing,
    routing_array,
)
from storage.codecs import Codec
from storage.keys import (
    KeyRange,
    Kind,
    block_key,
    document_key,
    encoding_key,
    everything,
    kind_range,
    memory_range,
    number_of,
    number_range,
    parse_key,
    related_keys,
)
from storage.layout import NUMPY_DTYPE, Bits, KVLayout
from storage.layout_json import fingerprint
from storage.lmdb_env import Environment
from storage.lmdb_pages import prefetch
from storage.store import (
    ContentPart,
    CorruptRecordError,
    EncodingId,
    Finding,
    MemoryUid,
    PackedRouting,
    RecordNotFoundError,
    RoutingPart,
    StoredDocument,
)
from storage.verify import find_problems

_T = TypeVar("_T")
_FEW = 16
_BATCH_RECORDS = 256
_BATCH_BYTES = 8 * 2**20


class LmdbReader:
    """BlockReader over an environment that another process writes.

    Raises at opening: StoreNotFoundError, StoreBusyError, StorageError.
    """

    def __init__(self, path: Path) -> None:
        self._environment = Environment(path, readonly=True)

    def get_document(self, memory: MemoryUid, number: int) -> StoredDocument:
        """See BlockReader."""
        key = document_key(memory, number)
        return read_document(key, self._get(key))

    def iter_documents(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[StoredDocument]:
        """See BlockReader. Read in batches: what is written meanwhile may show."""
        return self._scan(number_range(memory, Kind.DOCUMENT, None, first, last), read_document)

    def document_numbers(self, memory: MemoryUid) -> list[int]:
        """See TenantStore."""
        return self._numbers(number_range(memory, Kind.DOCUMENT, None, 0, None))

    def block_numbers(
        self, memory: MemoryUid, encoding: EncodingId, first: int = 0, last: int | None = None
    ) -> list[int]:
        """See BlockReader."""
        span = number_range(memory, Kind.ROUTING, encoding, first, last)
        # LMDB touches a page of every value on its way along the keys.
        self._prefetch(span)
        return self._numbers(span)

    def encoding_layout(self, memory: MemoryUid, encoding: EncodingId) -> KVLayout:
        """See BlockReader."""
        key = encoding_key(memory, encoding)
        return read_encoding(key, self._get(key))

    def iter_routing(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[RoutingPart]:
        """See BlockReader. Read in batches: what is written meanwhile may show."""
        span = number_range(memory, Kind.ROUTING, encoding, first, last)
        self._prefetch(span)
        mark = fingerprint(encoding, layout)
        return self._scan(span, lambda key, value: read_routing(key, value, mark, layout))

    def load_routing(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> PackedRouting:
        """See BlockReader. One read transaction, for as long as the copy takes."""
        span = number_range(memory, Kind.ROUTING, encoding, first, last)
        self._prefetch(span)
        return self._environment.read(
            lambda transaction: _pack(transaction, span, encoding, layout)
        )

    def get_content(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, number: int
    ) -> ContentPart:
        """See BlockReader."""
        key = block_key(memory, Kind.CONTENT, encoding, number)
        return read_content(key, self._get(key), fingerprint(encoding, layout), layout)

    def iter_content(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[ContentPart]:
        """See BlockReader. Read in batches: what is written meanwhile may show."""
        span = number_range(memory, Kind.CONTENT, encoding, first, last)
        self._prefetch(span)
        mark = fingerprint(encoding, layout)
        return self._scan(span, lambda key, value: read_content(key, value, mark, layout))

    def check(self) -> Iterator[Finding]:
        """See TenantStore. Beside a writer too: what is found is looked at again, at one
        moment, as the records of a block may have been read before and after its deletion.
        """
        return filter(self.holds, find_problems(self.iter_raw()))

    def holds(self, finding: Finding) -> bool:
        """Whether what was found is so at this moment, in one read transaction."""
        key = bytes.fromhex(finding.key)
        try:
            parsed = parse_key(key)
        except ValueError:
            return True
        related = related_keys(parsed)

        def copy(transaction: lmdb.Transaction) -> list[Record]:
            values = ((key, transaction.get(key)) for key in related)
            return [(key, bytes(value)) for key, value in values if value is not None]

        found = find_problems(self._environment.read(copy))
        return any((f.key, f.problem) == (finding.key, finding.problem) for f in found)

    def iter_raw(self) -> Iterator[Record]:
        """Every key and value as stored, unverified, in key order."""
        prefetch(self._environment.path, everything())
        return self._scan(everything(), lambda key, value: (key, bytes(value)))

    def memories(self) -> list[MemoryUid]:
        """See TenantStore."""

        def walk(transaction: lmdb.Transaction) -> list[MemoryUid]:
            found: list[MemoryUid] = []
            cursor = transaction.cursor()
            more = cursor.first()
            while more:
                memory = MemoryUid(bytes(cursor.key()[:16]))
                found.append(memory)
                more = cursor.set_range(memory_range(memory).last)
            return found

        return self._environment.read(walk)

    def encodings(self, memory: MemoryUid) -> list[EncodingId]:
        """See TenantStore."""
        span = kind_range(memory, Kind.ENCODING)
        return [EncodingId(key[17:33]) for key in self._keys(span)]

    def close(self) -> None:
        """See BlockReader."""
        self._environment.close()

    def _prefetch(self, span: KeyRange) -> None:
        """Worth its price, some 0.1 ms, for a run of documents."""
        if number_of(span.last) - number_of(span.first) >= _FEW:
            prefetch(self._environment.path, span)

    def _get(self, key: bytes) -> bytearray:
        def copy(transaction: lmdb.Transaction) -> bytearray | None:
            value = transaction.get(key)
            return None if value is None else bytearray(value)

        value = self._environment.read(copy)
        if value is None:
            raise RecordNotFoundError(key.hex())
        return value

    def _keys(self, span: KeyRange) -> list[bytes]:
        return self._environment.read(lambda transaction: list(keys_in(transaction, span)))

    def _numbers(self, span: KeyRange) -> list[int]:
        return [number_of(key) for key in self._keys(span)]

    def _scan(self, span: KeyRange, take: Callable[[bytes, memoryview], _T]) -> Iterator[_T]:
        """Takes each record inside a transaction, yields it outside: `take` must copy."""

        def batch(transaction: lmdb.Transaction) -> tuple[list[_T], bytes | None]:
            taken: list[_T] = []
            size = 0
            for key, value in records_in(transaction, rest):
                taken.append(take(key, value))
                size += len(value)
                if len(taken) == _BATCH_RECORDS or size >= _BATCH_BYTES:
                    return taken, key
            return taken, None

        rest = span
        while True:
            taken, end = self._environment.read(batch)
            yield from taken
            if end is None:
                return
            rest = rest.after(end)


def records_in(transaction: lmdb.Transaction, span: KeyRange) -> Iterator[tuple[bytes, memoryview]]:
    """Keys, and values as views that end with the transaction."""
    cursor = transaction.cursor()
    if not cursor.set_range(span.first):
        return
    for view, value in cursor.iternext():
        key = bytes(view)
        if key > span.last:
            return
        yield key, memoryview(value)


def keys_in(transaction: lmdb.Transaction, span: KeyRange) -> Iterator[bytes]:
    """Keys alone; touches one page of a value at most."""
    cursor = transaction.cursor()
    if not cursor.set_range(span.first):
        return
    for view in cursor.iternext(keys=True, values=False):
        key = bytes(view)
        if key > span.last:
            return
        yield key


def _pack(
    transaction: lmdb.Transaction, span: KeyRange, encoding: EncodingId, layout: KVLayout
) -> PackedRouting:
    mark = fingerprint(encoding, layout)
    # The views stay valid to the end of the transaction, so one pass verifies and sizes.
    found = [
        (key, *open_block(key, value, Kind.ROUTING, mark, layout))
        for key, value in records_in(transaction, span)
    ]
    chunks_N = [layout.chunks(header.tokens) for _, header, _ in found]
    shape = (len(layout.routed_layers), sum(chunks_N), layout.width)
    dtype = NUMPY_DTYPE[layout.dtype]
    packed: Bits = (
        np.empty(shape, np.uint16) if layout.dtype == "bf16" else np.empty(shape, np.float32)
    )
    start = 0
    for (key, header, payload), count in zip(found, chunks_N, strict=True):
        target = packed[:, start : start + count]
        if header.codec != Codec.RAW:
            target[...] = routing_array(key, header, payload, layout)
        elif len(payload) == target.nbytes:
            target[...] = np.frombuffer(payload, dtype).reshape(target.shape)
        else:
            raise CorruptRecordError(f"{key.hex()}: payload does not fit the layout")
        start += count
    return PackedRouting(
        numbers_N=np.array([number_of(key) for key, _, _ in found], np.int64),
        tokens_N=np.array([header.tokens for _, header, _ in found], np.int64),
        routing_key_LCE=packed,
    )
