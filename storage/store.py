"""The store contract: source documents and KV blocks of one tenant.

One store holds one tenant. Writes are atomic and durable when they return; a
memory is named by its uid (16 bytes), an encoding by the first 16 bytes of the
model identity. `tests/storage/contract.py` holds every implementation to this.
Calls block; callers in an event loop run them in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, Protocol

import numpy as np
import numpy.typing as npt

from storage.documents import Source
from storage.layout import Bits, KVBlock, KVLayout

MemoryUid = NewType("MemoryUid", bytes)
EncodingId = NewType("EncodingId", bytes)


class StorageError(Exception):
    """Root of what a store raises on its own account."""


class StoreNotFoundError(StorageError):
    """There is no store at the path that was to be read."""


class TenantRemovedError(StorageError):
    """The tenant was deleted: its store and keys are gone for good, and not made again."""


class StoreBusyError(StorageError):
    """Another handle holds what only one may: the writer's lock, or the last reader slot."""


class StoreUnavailableError(StorageError):
    """The disk does not work, or the store is closed; nothing of the call was written."""


class StorageFullError(StorageError):
    """Disk or map is full; nothing of the call was written."""


class RecordNotFoundError(StorageError, KeyError):
    """No such record."""


class CorruptRecordError(StorageError):
    """A record's bytes do not match its checksum, key or lengths."""


class StoreDamagedError(CorruptRecordError):
    """The store's file is damaged below its records: no record of it can be trusted."""


class ForeignRecordError(StorageError):
    """A record of another format version, model or layout."""


class KeyMissingError(CorruptRecordError):
    """What is stored is encrypted, and its key was destroyed or is not given."""


class WrongKeyError(CorruptRecordError):
    """A record is whole and does not open: another key, another place, or a forgery."""


@dataclass(frozen=True)
class StoredDocument:
    """A source document. text_bytes: UTF-8 bytes of its text."""

    number: int
    revision: int
    created_at_us: int
    source: Source


@dataclass(frozen=True)
class LetGo:
    """What a deletion took away. texts, blocks: records that went. shared: numbers of the
    documents whose records stay, because another memory shows them, ascending.
    """

    texts: int = 0
    blocks: int = 0
    shared: tuple[int, ...] = ()


#: Gives writable memory of so many bytes, contiguous, aligned as numbers are.
Room = Callable[[int], memoryview]


@dataclass(frozen=True, eq=False)
class RoutingPart:
    """Routing keys of one document, [L, C, E], copied out of the store."""

    number: int
    tokens: int
    routing_key_LCE: Bits


@dataclass(frozen=True, eq=False)
class PackedRouting:
    """Routing keys of many documents in one array, copied out of the store.

    numbers_N and tokens_N are ascending by number; document i's chunks lie behind
    document i-1's along C, `layout.chunks(tokens_N[i])` of them.
    """

    numbers_N: npt.NDArray[np.int64]
    tokens_N: npt.NDArray[np.int64]
    routing_key_LCE: Bits


@dataclass(frozen=True, eq=False)
class ContentPart:
    """Content KV of one document, [L, C, E], copied out of the store.

    key_LCE is None when the layout routes with the content keys.
    """

    number: int
    key_LCE: Bits | None
    value_LCE: Bits


class Problem(StrEnum):
    """What `check` can find wrong with a record."""

    DAMAGED = "damaged"  # Its bytes, lengths or contents are not as they were written.
    FOREIGN = "foreign"  # Another format version, or another layout than its encoding.
    HALF_BLOCK = "half-block"  # Routing keys without content, or content without them.
    NO_DOCUMENT = "no-document"  # A block whose document is not there.
    NO_LAYOUT = "no-layout"  # A block whose encoding's record is not there.
    NO_KEY = "no-key"  # It is encrypted, and the key to it is gone.
    HALF_LINEAGE = "half-lineage"  # Inherited, and not lent, or the other way round.
    STRAY_KEY = "stray-key"  # A key that this format does not make.


@dataclass(frozen=True)
class Finding:
    """One thing `check` found wrong. key: the record's key in hex. detail: for people."""

    key: str
    problem: Problem
    detail: str = ""


class BlockReader(Protocol):
    """What a worker may do: read."""

    def get_document(self, memory: MemoryUid, number: int) -> StoredDocument:
        """Raises RecordNotFoundError, CorruptRecordError."""

    def iter_documents(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[StoredDocument]:
        """Documents with first <= number <= last, ascending."""

    def iter_document_json(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """As iter_documents: numbers, and the JSON that an archive holds, without its line end."""

    def block_numbers(
        self, memory: MemoryUid, encoding: EncodingId, first: int = 0, last: int | None = None
    ) -> list[int]:
        """Numbers of the documents that have a block, ascending."""

    def iter_routing(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[RoutingPart]:
        """Ascending document number. Raises CorruptRecordError, ForeignRecordError."""

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
        """What iter_routing yields, in one array and several times as fast.

        room: where the array is to lie; None: in new memory. Empty arrays when there is no
        block. Raises CorruptRecordError, ForeignRecordError; room then holds nothing of worth.
        """

    def encoding_layout(self, memory: MemoryUid, encoding: EncodingId) -> KVLayout:
        """Layout that the encoding's blocks were written with.

        Raises RecordNotFoundError when it has no block, CorruptRecordError.
        """

    def get_content(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, number: int
    ) -> ContentPart:
        """Raises RecordNotFoundError, CorruptRecordError, ForeignRecordError."""

    def iter_content(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[ContentPart]:
        """Contents of a run of documents, ascending: for copying an encoding, not for answering.

        Raises CorruptRecordError, ForeignRecordError.
        """

    def close(self) -> None:
        """Frees the handle; further calls raise StorageError."""


class TenantStore(BlockReader, Protocol):
    """What memsvc, the only writer, may do besides."""

    def put_documents(self, memory: MemoryUid, documents: Sequence[StoredDocument]) -> int:
        """Writes all or none, replacing what has the same number. Returns stored bytes.

        Raises StorageFullError.
        """

    def put_blocks(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, blocks: Sequence[KVBlock]
    ) -> int:
        """Writes all or none, replacing what has the same number. Returns stored bytes.

        Raises LayoutError for a block that does not fit, ForeignRecordError when the
        encoding's blocks have another layout, StorageFullError.
        """

    def fork(
        self, memory: MemoryUid, child: MemoryUid, last: int, without: Sequence[int] = ()
    ) -> None:
        """Has the new memory `child` show what `memory` shows up to the number `last`, without
        copying it. From then on what is written to or deleted from one does not show in the
        other; blocks that either makes of a shared document serve both.

        without: documents that the child is not to show. `last` is at or above every number
        that was given out as of what is forked.
        """

    def sharing(self, memory: MemoryUid, numbers: Sequence[int]) -> list[MemoryUid]:
        """The memories that show one of these documents, itself included unless it was deleted."""

    def delete_documents(self, memory: MemoryUid, numbers: Sequence[int]) -> LetGo:
        """Removes texts and the blocks of every encoding, of those that another memory shares
        from this memory alone. Unknown numbers are no error.
        """

    def delete_blocks(
        self, memory: MemoryUid, encoding: EncodingId, numbers: Sequence[int]
    ) -> None:
        """Removes blocks alone, so that they are made again, for whoever shares the documents.
        Unknown numbers are no error.
        """

    def delete_encoding(self, memory: MemoryUid, encoding: EncodingId) -> None:
        """Removes every block of one encoding, but for those that another memory with that
        encoding shares.
        """

    def delete_memory(self, memory: MemoryUid) -> LetGo:
        """Removes everything under a memory, but for what another one shares. An unknown one
        is no error.
        """

    def memories(self) -> list[MemoryUid]:
        """Every memory that has a record."""

    def encodings(self, memory: MemoryUid) -> list[EncodingId]:
        """Every encoding of a memory that has a block."""

    def document_numbers(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> list[int]:
        """Numbers of the stored documents in the range, ascending; reads no values."""

    def check(self) -> Iterator[Finding]:
        """Verifies every record; yields nothing when all are sound."""
