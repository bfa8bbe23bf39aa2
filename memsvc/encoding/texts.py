"""Batches: what is read from a tenant's store before, and written after, encoding.

The functions that take a store run in one of its threads; the writing ones in
its single writer thread, so nothing else changes the store under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memsvc.workers import DocumentText
from storage.documents import render
from storage.layout import KVBlock, KVLayout
from storage.store import (
    BlockReader,
    CorruptRecordError,
    EncodingId,
    ForeignRecordError,
    MemoryUid,
    RecordNotFoundError,
    TenantStore,
)

#: ErrorReason name under which a document without readable text is set aside.
CORRUPT = "RECORD_CORRUPT"


@dataclass(frozen=True)
class Target:
    """Where blocks belong."""

    memory: MemoryUid
    encoding: EncodingId
    layout: KVLayout

    @classmethod
    def of(cls, memory_uid: str, identity: str, layout: KVLayout) -> Target:
        """memory_uid and identity in hex, as the catalog has them."""
        return cls(
            MemoryUid(bytes.fromhex(memory_uid)),
            EncodingId(bytes.fromhex(identity)[:16]),
            layout,
        )


@dataclass
class Texts:
    """Documents read for one batch, of at most max_bytes; the first is always taken.

    up_to: every wanted number at or below it is accounted for here. done: tokens
    of documents that already have a sound block. missing: numbers without a
    record. corrupt: numbers whose record is damaged.
    """

    max_bytes: int
    up_to: int = 0
    documents: list[DocumentText] = field(default_factory=list)
    text_bytes: int = 0
    done: dict[int, int] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)

    def take(self, number: int, text: str) -> bool:
        """False: there is no room for it."""
        size = len(text.encode())
        if self.documents and self.text_bytes + size > self.max_bytes:
            return False
        self.documents.append(DocumentText(number, text))
        self.text_bytes += size
        return True


def read_texts(store: BlockReader, target: Target, numbers: Sequence[int], texts: Texts) -> bool:
    """Renders documents by ascending number; False when there is no room for the next."""
    texts.done.update(_done(store, target, numbers))
    for number in numbers:
        if number not in texts.done:
            try:
                text = render(store.get_document(target.memory, number).source)
            except RecordNotFoundError:
                texts.missing.append(number)
            except CorruptRecordError:
                texts.corrupt.append(number)
            else:
                if not texts.take(number, text):
                    return False
        texts.up_to = number
    return True


def _done(store: BlockReader, target: Target, numbers: Sequence[int]) -> dict[int, int]:
    """Tokens of those that have a sound block: a crash came between block and watermark."""
    wanted = set(numbers)
    existing = store.block_numbers(target.memory, target.encoding, numbers[0], numbers[-1])
    done: dict[int, int] = {}
    for number in existing:
        if number not in wanted:
            continue
        try:
            parts = list(
                store.iter_routing(target.memory, target.encoding, target.layout, number, number)
            )
            store.get_content(target.memory, target.encoding, target.layout, number)
        except (CorruptRecordError, ForeignRecordError, RecordNotFoundError):
            # Encoded again, which replaces it.
            continue
        done.update((part.number, part.tokens) for part in parts)
    return done


def write_live_blocks(
    store: TenantStore, target: Target, blocks: Sequence[KVBlock]
) -> tuple[int, list[KVBlock]]:
    """Writes the blocks whose document is still there. Returns stored bytes and those written.

    A deletion removes a document's text and blocks in this same thread: either
    it ran before, and the text is gone, or it runs later, and takes the block along.
    """
    numbers = [block.number for block in blocks]
    there = set(store.document_numbers(target.memory, min(numbers), max(numbers)))
    live = [block for block in blocks if block.number in there]
    if not live:
        return 0, []
    return store.put_blocks(target.memory, target.encoding, target.layout, live), live


def drop_encodings(store: TenantStore, memory: MemoryUid, keep: frozenset[EncodingId]) -> None:
    """Removes a memory's encodings but those to keep."""
    for encoding in store.encodings(memory):
        if encoding not in keep:
            store.delete_encoding(memory, encoding)


def has_text(store: TenantStore, memory: MemoryUid, number: int) -> bool:
    """Whether the document is there, be it damaged."""
    return bool(store.document_numbers(memory, number, number))
