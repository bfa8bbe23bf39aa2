"""Reading a tenant's environment, in the writer's process or in another, and verifying it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import lmdb

from storage import lineage
from storage.block_records import Record
from storage.crypto.key_tree import KeyTree
from storage.keys import (
    UID_BYTES,
    Kind,
    everything,
    kind_range,
    memory_range,
    parse_key,
    related_keys,
)
from storage.layout import KVLayout
from storage.lineage import View
from storage.lmdb_pages import prefetch
from storage.lmdb_records import LmdbRecords
from storage.store import (
    CorruptRecordError,
    EncodingId,
    Finding,
    KeyMissingError,
    MemoryUid,
    StorageError,
)
from storage.verify import FindKeys, find_problems


class LmdbReader(LmdbRecords):
    """BlockReader over an environment that another process writes.

    keys: of an encrypted store; None for one without encryption. Reading an encrypted
    record of a memory that the source has no key of raises KeyMissingError. Raises at
    opening: StoreNotFoundError, StoreBusyError, StorageError.
    """

    def check(
        self, watch: Callable[[Iterator[Record]], Iterator[Record]] = lambda records: records
    ) -> Iterator[Finding]:
        """See TenantStore. Beside a writer too: what is found is looked at again, at one
        moment, as the records of a block may have been read before and after its deletion.

        watch: sees every record on its way to be verified.
        """
        found = find_problems(watch(self.iter_raw()), self._found_keys, self._lent_layouts)
        return filter(self.holds, found)

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
        found = find_problems(self._environment.read(copy), keys, self._lent_layouts)
        return any((f.key, f.problem) == (finding.key, finding.problem) for f in found)

    def _keys_now(self, memory: MemoryUid) -> FindKeys:
        try:
            found = self._found_keys(memory)
        except CorruptRecordError:
            return self._found_keys
        return lambda _: found

    def _found_keys(self, memory: MemoryUid) -> tuple[int, KeyTree | None]:
        """Generation and tree of a memory's key, with the keys to its documents that others
        share. Raises KeyMissingError, CorruptRecordError.
        """
        if self._keys is None:
            return 0, None
        missing: KeyMissingError | None = None
        generation, tree = 0, KeyTree({})
        try:
            own = self._keys.of(memory)
            if own is None:
                return 0, None
            generation, tree = own.generation, self._tree_of(memory, own)
        except KeyMissingError as error:
            missing = error
        if missing is None and not self._has_any(kind_range(memory, Kind.HIDDEN)):
            return generation, tree
        for other, last in self._environment.read(lambda t: lineage.lent_by(t, memory)):
            with suppress(KeyMissingError):  # Of the other memory this is found by itself.
                lent = self._tree(other)
                if lent is not None:
                    tree, missing = lent.within(1, last).joined(tree), None
        if missing is not None:
            raise missing
        return generation, tree

    def _lent_layouts(self, memory: MemoryUid) -> dict[EncodingId, KVLayout]:
        """Of encodings that those have who share the memory's documents."""
        found: dict[EncodingId, KVLayout] = {}
        for other, _ in self._environment.read(lambda t: lineage.lent_by(t, memory)):
            for encoding in self.encodings(other):
                with suppress(StorageError):  # Found by itself, of the other memory.
                    found.setdefault(encoding, self.encoding_layout(other, encoding))
        return found

    def iter_raw(self) -> Iterator[Record]:
        """Every key and value as stored, unverified, in key order."""
        prefetch(self._environment.path, everything())
        whole = View([everything()], frozenset())
        return self._scan(whole, lambda key, value: (key, bytes(value)))
