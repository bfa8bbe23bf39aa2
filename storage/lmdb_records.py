"""Reading the records of a tenant's environment; storage/lmdb_reader.py verifies them too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

import lmdb

from storage import lineage
from storage.block_records import (
    read_content,
    read_document,
    read_document_json,
    read_encoding,
    read_keys,
    read_routing,
)
from storage.codecs import Zstd
from storage.crypto.key_tree import KeyTree
from storage.crypto.memory_secret import KeySource, MemorySecret
from storage.keys import (
    UID_BYTES,
    KeyRange,
    Kind,
    block_key,
    document_key,
    encoding_key,
    hidden_key,
    keys_key,
    kind_range,
    memory_range,
    number_of,
)
from storage.layout import KVLayout
from storage.layout_json import fingerprint
from storage.lineage import View
from storage.lmdb_env import Environment
from storage.lmdb_pages import prefetch
from storage.lmdb_scan import has_any, keys_in
from storage.records import Buffer
from storage.routing_pack import pack_routing
from storage.store import (
    ContentPart,
    EncodingId,
    KeyMissingError,
    MemoryUid,
    PackedRouting,
    RecordNotFoundError,
    Room,
    RoutingPart,
    StoredDocument,
)

_T = TypeVar("_T")
_FEW = 16
_BATCH_RECORDS = 256
_BATCH_BYTES = 8 * 2**20


class LmdbRecords:
    """What LmdbReader reads with; see there."""

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
        return self._open(key, read_document)

    def iter_documents(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[StoredDocument]:
        """See BlockReader. Read in batches: what is written meanwhile may show."""
        view = self._view(memory, Kind.DOCUMENT, None, first, last)
        return self._scan_memory(memory, view, partial(read_document, zstd=Zstd()))

    def iter_document_json(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """See BlockReader."""
        view = self._view(memory, Kind.DOCUMENT, None, first, last)
        return self._scan_memory(memory, view, partial(read_document_json, zstd=Zstd()))

    def document_numbers(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> list[int]:
        """See TenantStore."""
        return self._numbers(self._view(memory, Kind.DOCUMENT, None, first, last))

    def block_numbers(
        self, memory: MemoryUid, encoding: EncodingId, first: int = 0, last: int | None = None
    ) -> list[int]:
        """See BlockReader."""
        view = self._view(memory, Kind.ROUTING, encoding, first, last)
        # LMDB touches a page of every value on its way along the keys.
        self._prefetch(view)
        return self._numbers(view)

    def encoding_layout(self, memory: MemoryUid, encoding: EncodingId) -> KVLayout:
        """See BlockReader."""
        return self._open(encoding_key(memory, encoding), read_encoding)

    def iter_routing(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[RoutingPart]:
        """See BlockReader. Read in batches: what is written meanwhile may show."""
        view = self._view(memory, Kind.ROUTING, encoding, first, last)
        self._prefetch(view)
        mark = fingerprint(encoding, layout)
        return self._scan_memory(
            memory, view, lambda key, value, tree: read_routing(key, value, mark, layout, tree)
        )

    def load_routing(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
        *,
        room: Room | None = None,
    ) -> PackedRouting:
        """See BlockReader. One read transaction, for as long as the copy takes."""
        view = self._view(memory, Kind.ROUTING, encoding, first, last)
        self._prefetch(view)
        if not self._shows_any(view):
            return pack_routing([], encoding, layout, None, room)
        tree = self._tree(memory)
        return self._environment.read(
            lambda transaction: pack_routing(
                view.records(transaction), encoding, layout, tree, room
            )
        )

    def get_content(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, number: int
    ) -> ContentPart:
        """See BlockReader."""
        key = block_key(memory, Kind.CONTENT, encoding, number)
        mark = fingerprint(encoding, layout)
        return self._open(
            key, lambda place, value, tree: read_content(place, value, mark, layout, tree)
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
        view = self._view(memory, Kind.CONTENT, encoding, first, last)
        self._prefetch(view)
        mark = fingerprint(encoding, layout)
        return self._scan_memory(
            memory, view, lambda key, value, tree: read_content(key, value, mark, layout, tree)
        )

    def memories(self) -> list[MemoryUid]:
        """See TenantStore."""

        def walk(transaction: lmdb.Transaction) -> list[MemoryUid]:
            found: list[MemoryUid] = []
            cursor = transaction.cursor()
            more = cursor.first()
            while more:
                memory = MemoryUid(bytes(cursor.key())[:UID_BYTES])
                if transaction.get(hidden_key(memory, 0)) is None:
                    found.append(memory)
                more = cursor.set_range(memory_range(memory).last)
            return found

        return self._environment.read(walk)

    def encodings(self, memory: MemoryUid) -> list[EncodingId]:
        """See TenantStore."""
        span = kind_range(memory, Kind.ENCODING)
        return [EncodingId(key[17:33]) for key in self._keys_of(span)]

    def sharing(self, memory: MemoryUid, numbers: Sequence[int]) -> list[MemoryUid]:
        """See TenantStore."""
        return self._environment.read(lambda t: lineage.sharing(t, memory, numbers))

    def snapshot(self) -> AbstractContextManager[Callable[[Path], None]]:
        """See Environment.snapshot."""
        return self._environment.snapshot()

    def close(self) -> None:
        """See BlockReader."""
        self._environment.close()

    def _view(
        self,
        memory: MemoryUid,
        kind: Kind,
        encoding: EncodingId | None,
        first: int,
        last: int | None,
    ) -> View:
        return self._environment.read(
            lambda transaction: lineage.view(transaction, memory, kind, encoding, first, last)
        )

    def _prefetch(self, view: View) -> None:
        """Worth its price, some 0.1 ms, for a run of documents."""
        for span in view.spans:
            if number_of(span.last) - number_of(span.first) >= _FEW:
                prefetch(self._environment.path, span)

    def _open(self, key: bytes, take: Callable[[bytes, memoryview, KeyTree | None], _T]) -> _T:
        """Takes one record from where it lies, with the memory's keys. key: as if the memory
        were the owner. Raises RecordNotFoundError.
        """
        memory, number = MemoryUid(key[:UID_BYTES]), number_of(key)

        def find(transaction: lmdb.Transaction) -> tuple[bytes, Buffer] | None:
            place: bytes = key
            if number and not lineage.is_alone(transaction, memory):
                if lineage.is_hidden(transaction, memory, number):
                    return None
                place = lineage.owner_of(transaction, memory, number) + key[UID_BYTES:]
            value = transaction.get(place)
            return None if value is None else (place, value)

        def work(transaction: lmdb.Transaction) -> tuple[_T] | None:
            found = find(transaction)
            return None if found is None else (take(found[0], memoryview(found[1]), tree),)

        try:
            tree = self._tree(memory)
        except KeyMissingError:
            if self._environment.read(lambda transaction: find(transaction) is not None):
                raise
            raise RecordNotFoundError(key.hex()) from None  # What is not there needs no key.
        record = self._environment.read(work)
        if record is None:
            raise RecordNotFoundError(key.hex())
        return record[0]

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

    def _shows_any(self, view: View) -> bool:
        keys = self._environment.read(lambda transaction: next(view.keys(transaction), None))
        return keys is not None

    def _scan_memory(
        self,
        memory: MemoryUid,
        view: View,
        take: Callable[[bytes, memoryview, KeyTree | None], _T],
    ) -> Iterator[_T]:
        """Takes the records that a memory shows, with its keys."""
        if not self._shows_any(view):
            return iter(())
        tree = self._tree(memory)
        return self._scan(view, lambda key, value: take(key, value, tree))

    def _keys_of(self, span: KeyRange) -> list[bytes]:
        return self._environment.read(lambda transaction: list(keys_in(transaction, span)))

    def _numbers(self, view: View) -> list[int]:
        return self._environment.read(
            lambda transaction: [number_of(key) for key in view.keys(transaction)]
        )

    def _scan(self, view: View, take: Callable[[bytes, memoryview], _T]) -> Iterator[_T]:
        """Takes each record inside a transaction, yields it outside: `take` must copy."""

        def batch(transaction: lmdb.Transaction) -> tuple[list[_T], bytes | None]:
            taken: list[_T] = []
            size = 0
            for key, value in rest.records(transaction):
                taken.append(take(key, value))
                size += len(value)
                if len(taken) == _BATCH_RECORDS or size >= _BATCH_BYTES:
                    return taken, key
            return taken, None

        rest = view
        while True:
            taken, end = self._environment.read(batch)
            yield from taken
            if end is None:
                return
            rest = rest.after(end)
