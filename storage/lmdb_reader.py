"""Reading a tenant's environment: in the writer's process or in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import lmdb

from storage.block_records import (
    Record,
    read_content,
    read_document,
    read_encoding,
    read_keys,
    read_routing,
)
from storage.crypto.key_tree import KeyTree
from storage.crypto.memory_secret import KeySource, MemorySecret
from storage.keys import (
    UID_BYTES,
    KeyRange,
    Kind,
    block_key,
    document_key,
    encoding_key,
    everything,
    keys_key,
    kind_range,
    memory_range,
    number_of,
    number_range,
    parse_key,
    related_keys,
)
from storage.layout import KVLayout
from storage.layout_json import fingerprint
from storage.lmdb_env import Environment
from storage.lmdb_pages import prefetch
from storage.lmdb_scan import has_any, keys_in, records_in
from storage.routing_pack import pack_routing
from storage.store import (
    ContentPart,
    CorruptRecordError,
    EncodingId,
    Finding,
    KeyMissingError,
    MemoryUid,
    PackedRouting,
    RecordNotFoundError,
    RoutingPart,
    StoredDocument,
)
from storage.verify import FindKeys, find_problems

_T = TypeVar("_T")
_FEW = 16
_BATCH_RECORDS = 256
_BATCH_BYTES = 8 * 2**20


class LmdbReader:
    """BlockReader over an environment that another process writes.

    keys: of an encrypted store; None for one without encryption. Reading an encrypted
    record of a memory that the source has no key of raises KeyMissingError. Raises at
    opening: StoreNotFoundError, StoreBusyError, StorageError.
    """

    def __init__(self, path: Path, keys: KeySource | None = None) -> None:
        self._environment = Environment(path, readonly=True)
        self._keys = keys

    def _tree(self, memory: MemoryUid) -> KeyTree | None:
        """Keys of the memory's documents. Raises KeyMissingError."""
        own = None if self._keys is None else self._keys.of(memory)
        return None if own is None else self._tree_of(memory, own)

    def _tree_of(self, memory: MemoryUid, own: MemorySecret) -> KeyTree:
        def load(key: MemorySecret) -> KeyTree:
            place = keys_key(memory, key.generation)
            try:
                return self._get(place, lambda value: read_keys(place, value, key.key))
            except RecordNotFoundError:
                text = f"the record of memory {memory.hex()}'s keys is not there"
                raise KeyMissingError(text) from None

        return own.tree(load)

    def get_document(self, memory: MemoryUid, number: int) -> StoredDocument:
        """See BlockReader."""
        key = document_key(memory, number)
        return self._open(key, memory, lambda value, tree: read_document(key, value, tree))

    def iter_documents(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[StoredDocument]:
        """See BlockReader. Read in batches: what is written meanwhile may show."""
        span = number_range(memory, Kind.DOCUMENT, None, first, last)
        return self._scan_memory(memory, span, read_document)

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
        return self._open(key, memory, lambda value, tree: read_encoding(key, value, tree))

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
        return self._scan_memory(
            memory, span, lambda key, value, tree: read_routing(key, value, mark, layout, tree)
        )

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
        if not self._has_any(span):
            return pack_routing([], encoding, layout, None)
        tree = self._tree(memory)
        return self._environment.read(
            lambda transaction: pack_routing(records_in(transaction, span), encoding, layout, tree)
        )

    def get_content(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, number: int
    ) -> ContentPart:
        """See BlockReader."""
        key = block_key(memory, Kind.CONTENT, encoding, number)
        mark = fingerprint(encoding, layout)
        return self._open(
            key, memory, lambda value, tree: read_content(key, value, mark, layout, tree)
        )

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
        return self._scan_memory(
            memory, span, lambda key, value, tree: read_content(key, value, mark, layout, tree)
        )

    def check(
        self, watch: Callable[[Iterator[Record]], Iterator[Record]] = lambda records: records
    ) -> Iterator[Finding]:
        """See TenantStore. Beside a writer too: what is found is looked at again, at one
        moment, as the records of a block may have been read before and after its deletion.

        watch: sees every record on its way to be verified.
        """
        return filter(self.holds, find_problems(watch(self.iter_raw()), self._found_keys))

    def holds(self, finding: Finding) -> bool:
        """Whether what was found is so at this moment, in one read transaction."""
        key = bytes.fromhex(finding.key)
        if len(key) == UID_BYTES:
            return self._has_any(memory_range(MemoryUid(key)))
        try:
            parsed = parse_key(key)
        except ValueError:
            return True
        related = related_keys(parsed)

        def copy(transaction: lmdb.Transaction) -> list[Record]:
            values = ((key, transaction.get(key)) for key in related)
            return [(key, bytes(value)) for key, value in values if value is not None]

        # The keys first: whoever deletes meanwhile takes records away that they still open.
        keys = self._keys_now(parsed.memory)
        found = find_problems(self._environment.read(copy), keys)
        return any((f.key, f.problem) == (finding.key, finding.problem) for f in found)

    def _keys_now(self, memory: MemoryUid) -> FindKeys:
        try:
            found = self._found_keys(memory)
        except CorruptRecordError:
            return self._found_keys
        return lambda _: found

    def _found_keys(self, memory: MemoryUid) -> tuple[int, KeyTree | None]:
        """Generation and tree of a memory's key. Raises KeyMissingError, CorruptRecordError."""
        own = None if self._keys is None else self._keys.of(memory)
        return (0, None) if own is None else (own.generation, self._tree_of(memory, own))

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
                first = bytes(cursor.key())
                memory = MemoryUid(first[:16])
                if first[16] != Kind.KEYS:  # Keys alone are left when all documents went.
                    found.append(memory)
                more = cursor.set_range(memory_range(memory).last)
            return found

        return self._environment.read(walk)

    def encodings(self, memory: MemoryUid) -> list[EncodingId]:
        """See TenantStore."""
        span = kind_range(memory, Kind.ENCODING)
        return [EncodingId(key[17:33]) for key in self._keys_of(span)]

    def snapshot(self) -> AbstractContextManager[Callable[[Path], None]]:
        """See Environment.snapshot."""
        return self._environment.snapshot()

    def close(self) -> None:
        """See BlockReader."""
        self._environment.close()

    def _prefetch(self, span: KeyRange) -> None:
        """Worth its price, some 0.1 ms, for a run of documents."""
        if number_of(span.last) - number_of(span.first) >= _FEW:
            prefetch(self._environment.path, span)

    def _open(
        self, key: bytes, memory: MemoryUid, take: Callable[[memoryview, KeyTree | None], _T]
    ) -> _T:
        """Takes one record, with its memory's keys."""
        try:
            tree = self._tree(memory)
        except KeyMissingError:
            self._get(key, lambda _: None)  # What is not there needs no key.
            raise
        return self._get(key, lambda value: take(value, tree))

    def _get(self, key: bytes, take: Callable[[memoryview], _T]) -> _T:
        """Takes one record inside a transaction: `take` must copy. Raises RecordNotFoundError."""

        def work(transaction: lmdb.Transaction) -> tuple[_T] | None:
            value = transaction.get(key)
            return None if value is None else (take(memoryview(value)),)

        found = self._environment.read(work)
        if found is None:
            raise RecordNotFoundError(key.hex())
        return found[0]

    def _has_any(self, span: KeyRange) -> bool:
        return self._environment.read(lambda transaction: has_any(transaction, span))

    def _scan_memory(
        self,
        memory: MemoryUid,
        span: KeyRange,
        take: Callable[[bytes, memoryview, KeyTree | None], _T],
    ) -> Iterator[_T]:
        """Takes the records of a range, with their memory's keys."""
        if not self._has_any(span):
            return iter(())
        tree = self._tree(memory)
        return self._scan(span, lambda key, value: take(key, value, tree))

    def _keys_of(self, span: KeyRange) -> list[bytes]:
        return self._environment.read(lambda transaction: list(keys_in(transaction, span)))

    def _numbers(self, span: KeyRange) -> list[int]:
        return [number_of(key) for key in self._keys_of(span)]

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
