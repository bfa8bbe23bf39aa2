"""The store on LMDB: one environment per tenant, records as docs/format/records.md draws them.

LmdbStore is the writer, LmdbReader what another process opens. LMDB allows one
handle per file and process: share the object between threads instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import lmdb

from storage import lineage
from storage.block_records import (
    BlockCodecs,
    Record,
    block_records,
    document_record,
    encoding_record,
    keys_record,
    read_encoding,
)
from storage.codecs import Zstd
from storage.crypto.key_tree import SECRET_BYTES, KeyTree
from storage.crypto.memory_secret import KeyKeeper
from storage.failpoints import Failpoint, reach
from storage.keys import (
    MAX_NUMBER,
    Kind,
    check_encoding,
    check_memory,
    check_number,
    encoding_key,
    kind_range,
    memory_range,
    number_of,
)
from storage.layout import KVBlock, KVLayout
from storage.lmdb_env import Environment, MapLimits
from storage.lmdb_reader import LmdbReader
from storage.lmdb_scan import keys_in
from storage.store import (
    EncodingId,
    ForeignRecordError,
    KeyMissingError,
    LetGo,
    MemoryUid,
    RecordNotFoundError,
    StoredDocument,
)

__all__ = ["LmdbOptions", "LmdbReader", "LmdbStore"]

_T = TypeVar("_T")


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
        numbers = [document.number for document in documents]
        if any(owner != memory for owner in self._owners(memory, numbers)):
            raise ValueError("a document that was inherited is never written again")
        zstd = Zstd()
        return self._put(
            memory,
            numbers,
            lambda tree: [document_record(memory, one, tree, zstd) for one in documents],
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
        work: Callable[[lmdb.Transaction], _T],
        *,
        frees: bool = False,
    ) -> _T:
        """Runs a write after which the memory's documents have the keys of `tree`, and no others.

        The new tree is written under a new secret with the rest of the write; then the
        secret takes the old one's place. A crash between the two leaves the old keys, and the
        write to be repeated: reconcile does so.
        """
        assert self._keeper is not None
        old = self._keeper.of(memory).generation
        secret = secrets.token_bytes(SECRET_BYTES)
        key, value = keys_record(memory, old + 1, secret, tree)

        def change(transaction: lmdb.Transaction) -> _T:
            result = work(transaction)
            for stale in list(keys_in(transaction, kind_range(memory, Kind.KEYS))):
                # What still holds the old secret reads on until it is told of the new one.
                if number_of(stale) != old:
                    transaction.delete(stale)
            transaction.put(key, value)
            return result

        result = self._environment.write(change, len(value), frees=frees)
        reach(Failpoint.KEYS_STORED)
        self._keeper.replace(memory, secret, old + 1)
        reach(Failpoint.KEY_REPLACED)
        return result

    def put_blocks(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, blocks: Sequence[KVBlock]
    ) -> int:
        """See TenantStore."""
        check_memory(memory)
        check_encoding(encoding)
        if not blocks:
            return 0
        codecs = self._options.codecs
        numbers = [block.number for block in blocks]
        owned = list(zip(self._owners(memory, numbers), blocks, strict=True))

        def make(tree: KeyTree | None) -> list[Record]:
            # A block lies beside its document, whoever makes it.
            halves = [block_records(o, encoding, layout, b, codecs, tree) for o, b in owned]
            # Routing keys together, so that they lie together in the file.
            return [routing for routing, _ in halves] + [content for _, content in halves]

        def claim(transaction: lmdb.Transaction, tree: KeyTree | None) -> None:
            _claim(transaction, encoding_record(memory, encoding, layout, tree), layout, tree)

        return self._put(memory, numbers, make, claim)

    def _owners(self, memory: MemoryUid, numbers: Sequence[int]) -> list[MemoryUid]:
        """Under whom records of these documents lie. Raises RecordNotFoundError for one that
        the memory has let go of and another one shows, ValueError.
        """
        for number in numbers:
            check_number(number)

        def find(transaction: lmdb.Transaction) -> list[MemoryUid]:
            if lineage.is_alone(transaction, memory):
                return [memory] * len(numbers)
            for number in numbers:
                if lineage.is_hidden(transaction, memory, number):
                    raise RecordNotFoundError(f"memory {memory.hex()} has let go of {number}")
            parts = lineage.parts_of(transaction, memory)
            return [next(p.owner for p in parts if number <= p.last) for number in numbers]

        return self._environment.read(find)

    def fork(
        self, memory: MemoryUid, child: MemoryUid, last: int, without: Sequence[int] = ()
    ) -> None:
        """See TenantStore. The child has keys of its own for what it adds, and the keys of what
        it shares: it needs none of the memory that it comes from. Raises KeyMissingError.
        """
        check_memory(child)
        layouts = {one: self.encoding_layout(memory, one) for one in self.encodings(memory)}
        old = self._tree(memory) if self._has_any(memory_range(memory)) else None
        tree = self._writing_tree(child)
        if tree is not None:
            fresh = KeyTree.grown_from(secrets.token_bytes(SECRET_BYTES))
            tree = fresh.within(last + 1, MAX_NUMBER).joined(fresh.within(0, 0))
            tree = tree if old is None else tree.joined(old.within(1, last).without(without))
        records = [encoding_record(child, one, layout, tree) for one, layout in layouts.items()]

        def work(transaction: lmdb.Transaction) -> None:
            lineage.fork(transaction, memory, child, last, without)
            for key, value in records:
                transaction.put(key, value)

        if tree is None:
            self._environment.write(work)
        else:
            self._change_keys(child, tree, work)

    def delete_documents(self, memory: MemoryUid, numbers: Sequence[int]) -> LetGo:
        """See TenantStore. In an encrypted store the memory's keys to the documents are destroyed
        on return: what LMDB's free pages still hold of them cannot be read with any that is left.
        """
        for number in numbers:
            check_number(number)
        if not numbers:
            return LetGo()
        encodings = self.encodings(memory)

        def work(transaction: lmdb.Transaction) -> LetGo:
            gone = lineage.let_go_of(transaction, memory, numbers)
            _forget_empty(transaction, memory, encodings)
            return gone

        try:
            tree = self._tree(memory)
        except KeyMissingError:
            tree = None  # Destroyed with its memory, whose records go one way or another.
        if tree is None or not any(map(tree.holds, numbers)):
            return self._environment.write(work, frees=True)
        return self._change_keys(memory, tree.without(numbers), work, frees=True)

    def delete_blocks(
        self, memory: MemoryUid, encoding: EncodingId, numbers: Sequence[int]
    ) -> None:
        """See TenantStore."""
        check_memory(memory)
        check_encoding(encoding)
        for number in numbers:
            check_number(number)

        def work(transaction: lmdb.Transaction) -> None:
            for part in lineage.parts_of(transaction, memory):
                mine = [number for number in numbers if part.first <= number <= part.last]
                lineage.delete_blocks(transaction, part.owner, encoding, mine)
            _forget_empty(transaction, memory, [encoding])

        if numbers:
            self._environment.write(work, frees=True)

    def delete_encoding(self, memory: MemoryUid, encoding: EncodingId) -> None:
        """See TenantStore."""
        check_memory(memory)
        check_encoding(encoding)
        work = partial(lineage.drop_encoding, memory=memory, encoding=encoding)
        self._environment.write(work, frees=True)

    def delete_memory(self, memory: MemoryUid) -> LetGo:
        """See TenantStore. In an encrypted store the memory's key is destroyed first."""
        check_memory(memory)
        if self._keeper is not None:
            self._keeper.destroy(memory)
            reach(Failpoint.KEY_DESTROYED)
        return self._environment.write(partial(lineage.drop_memory, memory=memory), frees=True)


def _forget_empty(
    transaction: lmdb.Transaction, memory: MemoryUid, encodings: Sequence[EncodingId]
) -> None:
    """Deletes the records of encodings that have no block."""
    for encoding in encodings:
        views = (lineage.view(transaction, memory, k, encoding) for k in lineage.BLOCK_KINDS)
        if not any(next(view.keys(transaction), None) for view in views):
            transaction.delete(encoding_key(memory, encoding))


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
