"""The store on LMDB: one environment per tenant, records as docs/format/records.md draws them.

LmdbStore is the writer, LmdbReader what another process opens. LMDB allows one
handle per file and process: share the object between threads instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from storage.block_records import (
    BlockCodecs,
    Record,
    block_records,
    document_record,
    encoding_record,
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
    check_memory,
    document_key,
    encoding_key,
    everything,
    kind_range,
    memory_range,
    number_of,
    number_range,
)
from storage.layout import NUMPY_DTYPE, Bits, KVBlock, KVLayout
from storage.layout_json import fingerprint
from storage.lmdb_env import Environment, MapLimits
from storage.lmdb_pages import prefetch
from storage.store import (
    ContentPart,
    CorruptRecordError,
    EncodingId,
    Finding,
    ForeignRecordError,
    MemoryUid,
    PackedRouting,
    RecordNotFoundError,
    RoutingPart,
    StoredDocument,
)
from storage.verify import find_problems

_T = TypeVar("_T")
_BATCH_RECORDS = 256
_BATCH_BYTES = 8 * 2**20
_BLOCK_KINDS = (Kind.ROUTING, Kind.CONTENT)


@dataclass(frozen=True)
class LmdbOptions:
    """How a store is opened. codecs: of new blocks; each record names its own."""

    limits: MapLimits = field(default_factory=MapLimits)
    codecs: BlockCodecs = field(default_factory=BlockCodecs)


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
        return self._numbers(number_range(memory, Kind.ROUTING, encoding, first, last))

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
        prefetch(self._environment.path, span)
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
        prefetch(self._environment.path, span)
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
        prefetch(self._environment.path, span)
        mark = fingerprint(encoding, layout)
        return self._scan(span, lambda key, value: read_content(key, value, mark, layout))

    def check(self) -> Iterator[Finding]:
        """See TenantStore."""
        return find_problems(self.iter_raw())

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

    def _get(self, key: bytes) -> bytearray:
        def copy(transaction: lmdb.Transaction) -> bytearray | None:
            value = transaction.get(key)
            return None if value is None else bytearray(value)

        value = self._environment.read(copy)
        if value is None:
            raise RecordNotFoundError(key.hex())
        return value

    def _keys(self, span: KeyRange) -> list[bytes]:
        return self._environment.read(lambda transaction: list(_range_keys(transaction, span)))

    def _numbers(self, span: KeyRange) -> list[int]:
        return [number_of(key) for key in self._keys(span)]

    def _scan(self, span: KeyRange, take: Callable[[bytes, memoryview], _T]) -> Iterator[_T]:
        """Takes each record inside a transaction, yields it outside: `take` must copy."""

        def batch(transaction: lmdb.Transaction) -> tuple[list[_T], bytes | None]:
            taken: list[_T] = []
            size = 0
            for key, value in _range(transaction, rest):
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


class LmdbStore(LmdbReader):
    """TenantStore: the one writer of a tenant's environment, made when it is not there.

    Every write is one transaction, durable on return; 16 to 64 blocks a call write
    at nearly the disk's rate. Raises at opening: StoreBusyError, StorageFullError,
    StorageError.
    """

    def __init__(self, path: Path, options: LmdbOptions | None = None) -> None:
        self._options = options or LmdbOptions()
        self._environment = Environment(path, readonly=False, limits=self._options.limits)

    def put_documents(self, memory: MemoryUid, documents: Sequence[StoredDocument]) -> int:
        """See TenantStore. Raises ValueError for a document that cannot be written."""
        check_memory(memory)
        return self._put([document_record(memory, document) for document in documents])

    def put_blocks(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, blocks: Sequence[KVBlock]
    ) -> int:
        """See TenantStore."""
        own = encoding_record(memory, encoding, layout)
        if not blocks:
            return 0
        codecs = self._options.codecs
        halves = [block_records(memory, encoding, layout, block, codecs) for block in blocks]
        # Routing keys together, so that they lie together in the file.
        records = [routing for routing, _ in halves] + [content for _, content in halves]
        return self._put(records, own)

    def _put(self, records: list[Record], encoding: Record | None = None) -> int:
        size = sum(len(value) for _, value in records)

        def put(transaction: lmdb.Transaction) -> None:
            if encoding is not None:
                _claim(transaction, encoding)
            for key, value in records:
                transaction.put(key, value)

        if records:
            self._environment.write(put, size)
        return size

    def delete_documents(self, memory: MemoryUid, numbers: Sequence[int]) -> None:
        """See TenantStore."""
        encodings = self.encodings(memory)
        keys = [document_key(memory, number) for number in numbers]
        keys += _block_keys(memory, encodings, numbers)
        self._delete(memory, keys, encodings)

    def delete_blocks(
        self, memory: MemoryUid, encoding: EncodingId, numbers: Sequence[int]
    ) -> None:
        """See TenantStore."""
        self._delete(memory, _block_keys(memory, [encoding], numbers), [encoding])

    def _delete(
        self, memory: MemoryUid, keys: Sequence[bytes], encodings: Sequence[EncodingId]
    ) -> None:
        def delete(transaction: lmdb.Transaction) -> None:
            for key in keys:
                transaction.delete(key)
            for encoding in encodings:
                spans = (number_range(memory, kind, encoding, 0, None) for kind in _BLOCK_KINDS)
                if not any(_has_any(transaction, span) for span in spans):
                    transaction.delete(encoding_key(memory, encoding))

        if keys:
            self._environment.write(delete, frees=True)

    def delete_encoding(self, memory: MemoryUid, encoding: EncodingId) -> None:
        """See TenantStore."""
        own = encoding_key(memory, encoding)
        spans = [number_range(memory, kind, encoding, 0, None) for kind in _BLOCK_KINDS]
        self._delete_ranges([KeyRange(own, own), *spans])

    def delete_memory(self, memory: MemoryUid) -> None:
        """See TenantStore."""
        self._delete_ranges([memory_range(memory)])

    def _delete_ranges(self, spans: Sequence[KeyRange]) -> None:
        def delete(transaction: lmdb.Transaction) -> None:
            for span in spans:
                for key in list(_range_keys(transaction, span)):
                    transaction.delete(key)

        self._environment.write(delete, frees=True)


def _range(transaction: lmdb.Transaction, span: KeyRange) -> Iterator[tuple[bytes, memoryview]]:
    cursor = transaction.cursor()
    if not cursor.set_range(span.first):
        return
    for view, value in cursor.iternext():
        key = bytes(view)
        if key > span.last:
            return
        yield key, memoryview(value)


def _range_keys(transaction: lmdb.Transaction, span: KeyRange) -> Iterator[bytes]:
    cursor = transaction.cursor()
    if not cursor.set_range(span.first):
        return
    for view in cursor.iternext(keys=True, values=False):
        key = bytes(view)
        if key > span.last:
            return
        yield key


def _has_any(transaction: lmdb.Transaction, span: KeyRange) -> bool:
    return next(_range_keys(transaction, span), None) is not None


def _block_keys(
    memory: MemoryUid, encodings: Sequence[EncodingId], numbers: Sequence[int]
) -> list[bytes]:
    return [
        block_key(memory, kind, encoding, number)
        for encoding in encodings
        for kind in _BLOCK_KINDS
        for number in numbers
    ]


def _claim(transaction: lmdb.Transaction, encoding: Record) -> None:
    """Writes the encoding's own record, or makes sure that it is the same."""
    key, value = encoding
    found = transaction.get(key)
    if found is None:
        transaction.put(key, value)
    elif bytes(found) != value:
        read_encoding(key, found)  # Raises when it is damaged, rather than foreign.
        raise ForeignRecordError(f"{key.hex()}: the encoding has another layout")


def _pack(
    transaction: lmdb.Transaction, span: KeyRange, encoding: EncodingId, layout: KVLayout
) -> PackedRouting:
    mark = fingerprint(encoding, layout)
    # The views stay valid to the end of the transaction, so one pass verifies and sizes.
    found = [
        (key, *open_block(key, value, Kind.ROUTING, mark, layout))
        for key, value in _range(transaction, span)
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
