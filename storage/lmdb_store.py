"""The store on LMDB: one environment per tenant, records as docs/format/records.md draws them.

LmdbStore is the writer, LmdbReader what another process opens. LMDB allows one
handle per file and process: share the object between threads instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import lmdb

from storage.block_records import (
    BlockCodecs,
    Record,
    block_records,
    document_record,
    encoding_record,
    read_encoding,
)
from storage.keys import (
    KeyRange,
    Kind,
    block_key,
    check_memory,
    document_key,
    encoding_key,
    memory_range,
    number_range,
)
from storage.layout import KVBlock, KVLayout
from storage.lmdb_env import Environment, MapLimits
from storage.lmdb_reader import LmdbReader, keys_in
from storage.store import EncodingId, ForeignRecordError, MemoryUid, StoredDocument

__all__ = ["LmdbOptions", "LmdbReader", "LmdbStore"]

#: Keys held at a time while a range is deleted; it stays one transaction.
_DELETE_KEYS = 10_000
_BLOCK_KINDS = (Kind.ROUTING, Kind.CONTENT)


@dataclass(frozen=True)
class LmdbOptions:
    """How a store is opened. codecs: of new blocks; each record names its own."""

    limits: MapLimits = field(default_factory=MapLimits)
    codecs: BlockCodecs = field(default_factory=BlockCodecs)


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
                while keys := list(islice(keys_in(transaction, span), _DELETE_KEYS)):
                    for key in keys:
                        transaction.delete(key)

        self._environment.write(delete, frees=True)


def _has_any(transaction: lmdb.Transaction, span: KeyRange) -> bool:
    return next(keys_in(transaction, span), None) is not None


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
