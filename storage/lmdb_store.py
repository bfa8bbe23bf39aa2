"""The store on LMDB: one environment per tenant, records as docs/format/records.md draws them.

LmdbStore is the writer, LmdbReader what another process opens. LMDB allows one
handle per file and process: share the object between threads instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import lmdb

from storage.block_records import (
    BlockCodecs,
    Record,
    block_records,
    document_record,
    encoding_record,
    keys_record,
    read_encoding,
)
from storage.crypto.key_tree import SECRET_BYTES, KeyTree
from storage.crypto.memory_secret import KeyKeeper
from storage.failpoints import Failpoint, reach
from storage.keys import (
    KeyRange,
    Kind,
    block_key,
    check_encoding,
    check_memory,
    document_key,
    encoding_key,
    kind_range,
    memory_range,
    number_of,
    number_range,
)
from storage.layout import KVBlock, KVLayout
from storage.lmdb_env import Environment, MapLimits
from storage.lmdb_reader import LmdbReader
from storage.lmdb_scan import has_any, keys_in
from storage.store import (
    EncodingId,
    ForeignRecordError,
    KeyMissingError,
    MemoryUid,
    StoredDocument,
)

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
    at nearly the disk's rate. With keys everything is encrypted; without, nothing is.
    Raises at opening: StoreBusyError, StorageFullError, StorageError.
    """

    def __init__(
        self, path: Path, options: LmdbOptions | None = None, keys: KeyKeeper | None = None
    ) -> None:
        self._options = options or LmdbOptions()
        self._environment = Environment(path, readonly=False, limits=self._options.limits)
        self._keys = self._keeper = keys

    def put_documents(self, memory: MemoryUid, documents: Sequence[StoredDocument]) -> int:
        """See TenantStore. Raises ValueError for a document that cannot be written."""
        check_memory(memory)
        if not documents:
            return 0
        return self._put(
            memory,
            [document.number for document in documents],
            lambda tree: [document_record(memory, one, tree) for one in documents],
        )

    def _put(
        self,
        memory: MemoryUid,
        numbers: Sequence[int],
        make: Callable[[KeyTree | None], list[Record]],
        before: Callable[[lmdb.Transaction, KeyTree | None], None] | None = None,
    ) -> int:
        """Writes what `make` makes with the memory's keys. Returns stored bytes.

        A number whose document was deleted gets a new key.
        """
        tree = old = self._writing_tree(memory)
        if tree is not None and not all(map(tree.holds, numbers)):
            tree = tree.with_new(numbers)
        records = make(tree)
        size = sum(len(value) for _, value in records)

        def put(transaction: lmdb.Transaction) -> None:
            if before is not None:
                before(transaction, tree)
            for key, value in records:
                transaction.put(key, value)

        if tree is None or tree is old:
            self._environment.write(put, size)
        else:
            self._change_keys(memory, tree, put)
        return size

    def _writing_tree(self, memory: MemoryUid) -> KeyTree | None:
        """Keys to write with, made for a memory's first record. Raises KeyMissingError when
        there are records whose key was lost: others beside them would hide that.
        """
        try:
            return self._tree(memory)
        except KeyMissingError:
            if self._keeper is None or self._has_any(memory_range(memory)):
                raise
        self._keeper.create(memory)
        reach(Failpoint.KEY_CREATED)
        return self._tree(memory)

    def _change_keys(
        self,
        memory: MemoryUid,
        tree: KeyTree,
        work: Callable[[lmdb.Transaction], None],
        *,
        frees: bool = False,
    ) -> None:
        """Runs a write after which the memory's documents have the keys of `tree`, and no others.

        The new tree is written under a new secret with the rest of the write; then the
        secret takes the old one's place. A crash between the two leaves the old keys, and the
        write to be repeated: reconcile does so.
        """
        assert self._keeper is not None
        old = self._keeper.of(memory).generation
        secret = secrets.token_bytes(SECRET_BYTES)
        key, value = keys_record(memory, old + 1, secret, tree)

        def change(transaction: lmdb.Transaction) -> None:
            work(transaction)
            for stale in list(keys_in(transaction, kind_range(memory, Kind.KEYS))):
                # What still holds the old secret reads on until it is told of the new one.
                if number_of(stale) != old:
                    transaction.delete(stale)
            transaction.put(key, value)

        self._environment.write(change, len(value), frees=frees)
        reach(Failpoint.KEYS_STORED)
        self._keeper.replace(memory, secret, old + 1)
        reach(Failpoint.KEY_REPLACED)

    def put_blocks(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, blocks: Sequence[KVBlock]
    ) -> int:
        """See TenantStore."""
        check_memory(memory)
        check_encoding(encoding)
        if not blocks:
            return 0
        codecs = self._options.codecs

        def make(tree: KeyTree | None) -> list[Record]:
            halves = [block_records(memory, encoding, layout, b, codecs, tree) for b in blocks]
            # Routing keys together, so that they lie together in the file.
            return [routing for routing, _ in halves] + [content for _, content in halves]

        def claim(transaction: lmdb.Transaction, tree: KeyTree | None) -> None:
            _claim(transaction, encoding_record(memory, encoding, layout, tree), layout, tree)

        return self._put(memory, [block.number for block in blocks], make, claim)

    def delete_documents(self, memory: MemoryUid, numbers: Sequence[int]) -> None:
        """See TenantStore. In an encrypted store the documents' keys are destroyed on return:
        what LMDB's free pages still hold of them cannot be read.
        """
        if not numbers:
            return
        encodings = self.encodings(memory)
        keys = [document_key(memory, number) for number in numbers]
        keys += _block_keys(memory, encodings, numbers)
        work = partial(_delete, memory, keys, encodings)
        try:
            tree = self._tree(memory)
        except KeyMissingError:
            tree = None  # Destroyed with its memory, whose records go one way or another.
        if tree is None or not any(map(tree.holds, numbers)):
            self._environment.write(work, frees=True)
        else:
            self._change_keys(memory, tree.without(numbers), work, frees=True)

    def delete_blocks(
        self, memory: MemoryUid, encoding: EncodingId, numbers: Sequence[int]
    ) -> None:
        """See TenantStore."""
        keys = _block_keys(memory, [encoding], numbers)
        if keys:
            self._environment.write(partial(_delete, memory, keys, [encoding]), frees=True)

    def delete_encoding(self, memory: MemoryUid, encoding: EncodingId) -> None:
        """See TenantStore."""
        own = encoding_key(memory, encoding)
        spans = [number_range(memory, kind, encoding, 0, None) for kind in _BLOCK_KINDS]
        self._delete_ranges([KeyRange(own, own), *spans])

    def delete_memory(self, memory: MemoryUid) -> None:
        """See TenantStore. In an encrypted store the memory's key is destroyed first."""
        if self._keeper is not None:
            self._keeper.destroy(memory)
            reach(Failpoint.KEY_DESTROYED)
        self._delete_ranges([memory_range(memory)])

    def _delete_ranges(self, spans: Sequence[KeyRange]) -> None:
        def delete(transaction: lmdb.Transaction) -> None:
            for span in spans:
                while keys := list(islice(keys_in(transaction, span), _DELETE_KEYS)):
                    for key in keys:
                        transaction.delete(key)

        self._environment.write(delete, frees=True)


def _delete(
    memory: MemoryUid,
    keys: Sequence[bytes],
    encodings: Sequence[EncodingId],
    transaction: lmdb.Transaction,
) -> None:
    """Deletes records, and those of encodings that then have no block."""
    for key in keys:
        transaction.delete(key)
    for encoding in encodings:
        spans = (number_range(memory, kind, encoding, 0, None) for kind in _BLOCK_KINDS)
        if not any(has_any(transaction, span) for span in spans):
            transaction.delete(encoding_key(memory, encoding))


def _block_keys(
    memory: MemoryUid, encodings: Sequence[EncodingId], numbers: Sequence[int]
) -> list[bytes]:
    return [
        block_key(memory, kind, encoding, number)
        for encoding in encodings
        for kind in _BLOCK_KINDS
        for number in numbers
    ]


def _claim(
    transaction: lmdb.Transaction, own: Record, layout: KVLayout, tree: KeyTree | None
) -> None:
    """Writes the encoding's own record, or makes sure that there is the same."""
    key, value = own
    found = transaction.get(key)
    if found is None:
        transaction.put(key, value)
    elif read_encoding(key, found, tree) != layout:
        raise ForeignRecordError(f"{key.hex()}: the encoding has another layout")
