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
    """Documents read for one batch.

    up_to: every wanted number at or below it is accounted for here. done: tokens
    of documents that already have a sound block. missing: numbers without a
    record. corrupt: numbers whose record is damaged.
    """

    up_to: int
    documents: list[DocumentText] = field(default_factory=list)
    text_bytes: int = 0
    done: dict[int, int] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)


def read_texts(store: BlockReader, target: Target, numbers: Sequence[int], max_bytes: int) -> Texts:
    """Renders documents by ascending number until the next would pass max_bytes."""
    texts = Texts(up_to=0)
    texts.done = _done(store, target, numbers)
    for number in numbers:
        if number not in texts.done:
            try:
                text = render(store.get_document(target.memory, number).source)
            except RecordNotFoundError:
                texts.missing.append(number)
            except CorruptRecordError:
                texts.corrupt.append(number)
            else:
                size = len(text.encode())
                if texts.documents and texts.text_bytes + size > max_bytes:
                    break
                texts.documents.append(DocumentText(number, text))
                texts.text_bytes += size
        texts.up_to = number
    return texts


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
    live = [block for block in blocks if has_text(store, target.memory, block.number)]
    if not live:
        return 0, []
    return store.put_blocks(target.memory, target.encoding, target.layout, live), live


def drop_encodings(store: TenantStore, memory: MemoryUid, keep: frozenset[EncodingId]) -> None:
    """Removes a memory's encodings but those to keep."""
    for encoding in store.encodings(memory):
        if encoding not in keep:
            store.delete_encoding(memory, encoding)


def has_text(store: BlockReader, memory: MemoryUid, number: int) -> bool:
    """Whether the document is there, be it damaged."""
    try:
        store.get_document(memory, number)
    except RecordNotFoundError:
        return False
    except CorruptRecordError:
        return True
    return True
