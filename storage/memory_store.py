"""The store contract in plain dictionaries: the oracle of the tests, and a store for trials.

It keeps what it is given, so it has no codecs, no damage and no limits; nothing
is durable. Arrays are copied on the way in and out, as a real store does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from storage.document_json import encode_document
from storage.keys import Kind, block_key, check_encoding, check_memory, check_number
from storage.layout import NUMPY_DTYPE, Bits, KVBlock, KVLayout
from storage.store import (
    ContentPart,
    EncodingId,
    Finding,
    ForeignRecordError,
    LetGo,
    MemoryUid,
    PackedRouting,
    Problem,
    RecordNotFoundError,
    Room,
    RoutingPart,
    StorageError,
    StoredDocument,
)


@dataclass
class _Encoding:
    layout: KVLayout
    blocks: dict[int, KVBlock] = field(default_factory=dict)


@dataclass
class _Memory:
    documents: dict[int, StoredDocument] = field(default_factory=dict)
    encodings: dict[EncodingId, _Encoding] = field(default_factory=dict)
    #: Of inherited documents, the memory that wrote them.
    owners: dict[int, MemoryUid] = field(default_factory=dict)


class MemoryStore:
    """TenantStore that forgets everything with the process."""

    def __init__(self) -> None:
        self._memories: defaultdict[MemoryUid, _Memory] = defaultdict(_Memory)
        self._closed = False

    def _memory(self, memory: MemoryUid) -> _Memory:
        if self._closed:
            raise StorageError("the store is closed")
        check_memory(memory)
        return self._memories[memory]

    def _blocks(self, memory: MemoryUid, encoding: EncodingId) -> dict[int, KVBlock]:
        check_encoding(encoding)
        found = self._memory(memory).encodings.get(encoding)
        return found.blocks if found else {}

    def _readable(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout
    ) -> dict[int, KVBlock]:
        blocks = self._blocks(memory, encoding)
        if blocks and self._memories[memory].encodings[encoding].layout != layout:
            raise ForeignRecordError("the encoding has another layout")
        return blocks

    def get_document(self, memory: MemoryUid, number: int) -> StoredDocument:
        """See BlockReader."""
        check_number(number)
        try:
            return self._memory(memory).documents[number]
        except KeyError:
            raise RecordNotFoundError(f"document {number}") from None

    def iter_documents(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[StoredDocument]:
        """See BlockReader."""
        documents = self._memory(memory).documents
        return iter([documents[number] for number in _between(documents, first, last)])

    def iter_document_json(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """See BlockReader."""
        return ((d.number, encode_document(d)) for d in self.iter_documents(memory, first, last))

    def document_numbers(
        self, memory: MemoryUid, first: int = 0, last: int | None = None
    ) -> list[int]:
        """See TenantStore."""
        return _between(self._memory(memory).documents, first, last)

    def block_numbers(
        self, memory: MemoryUid, encoding: EncodingId, first: int = 0, last: int | None = None
    ) -> list[int]:
        """See BlockReader."""
        return _between(self._blocks(memory, encoding), first, last)

    def encoding_layout(self, memory: MemoryUid, encoding: EncodingId) -> KVLayout:
        """See BlockReader."""
        if not self._blocks(memory, encoding):
            raise RecordNotFoundError(f"encoding {encoding.hex()}")
        return self._memories[memory].encodings[encoding].layout

    def iter_routing(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[RoutingPart]:
        """See BlockReader."""
        blocks = self._readable(memory, encoding, layout)
        found = [blocks[number] for number in _between(blocks, first, last)]
        return (RoutingPart(b.number, b.tokens, b.routing_key_LCE.copy()) for b in found)

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
        """See BlockReader."""
        parts = list(self.iter_routing(memory, encoding, layout, first, last))
        shape = (len(layout.routed_layers), 0, layout.width)
        nothing = np.empty(shape, NUMPY_DTYPE[layout.dtype])
        arrays = [nothing, *(part.routing_key_LCE for part in parts)]
        joined = np.concatenate(arrays, axis=1)
        if room is not None:
            there = np.frombuffer(room(joined.nbytes), joined.dtype).reshape(joined.shape)
            there[...] = joined
            joined = there
        return PackedRouting(
            numbers_N=np.array([part.number for part in parts], np.int64),
            tokens_N=np.array([part.tokens for part in parts], np.int64),
            routing_key_LCE=cast(Bits, joined),
        )

    def get_content(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, number: int
    ) -> ContentPart:
        """See BlockReader."""
        check_number(number)
        block = self._readable(memory, encoding, layout).get(number)
        if block is None:
            raise RecordNotFoundError(f"block of document {number}")
        return _content(block)

    def iter_content(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[ContentPart]:
        """See BlockReader."""
        blocks = self._readable(memory, encoding, layout)
        found = [blocks[number] for number in _between(blocks, first, last)]
        return (_content(block) for block in found)

    def put_documents(self, memory: MemoryUid, documents: Sequence[StoredDocument]) -> int:
        """See TenantStore. Returns the bytes of the documents' JSON."""
        known = self._memory(memory).documents
        size = sum(len(encode_document(document)) for document in documents)
        known.update((document.number, document) for document in documents)
        return size

    def put_blocks(
        self, memory: MemoryUid, encoding: EncodingId, layout: KVLayout, blocks: Sequence[KVBlock]
    ) -> int:
        """See TenantStore."""
        for block in blocks:
            check_number(block.number)
            block.validate(layout)
        if not blocks:
            self._blocks(memory, encoding)  # Its names are still looked at.
            return 0
        self._readable(memory, encoding, layout)
        known = self._memory(memory)
        if encoding not in known.encodings:
            known.encodings[encoding] = _Encoding(layout)
            for number in known.documents:
                for shared in self._blocks_of(memory, encoding, number):
                    if number in shared:
                        known.encodings[encoding].blocks[number] = shared[number]
        for block in blocks:
            for held in self._blocks_of(memory, encoding, block.number):
                held[block.number] = _own(block)
        return sum(layout.block_bytes(block.tokens) for block in blocks)

    def fork(
        self, memory: MemoryUid, child: MemoryUid, last: int, without: Sequence[int] = ()
    ) -> None:
        """See TenantStore."""
        old, new = self._memory(memory), self._memory(child)
        hidden = frozenset(without)

        def shown(numbers: Iterable[int]) -> list[int]:
            return [n for n in numbers if n <= last and n not in hidden]

        new.documents = {n: old.documents[n] for n in shown(old.documents)}
        new.owners = {n: old.owners.get(n, memory) for n in new.documents}
        for encoding, held in old.encodings.items():
            blocks = {n: held.blocks[n] for n in shown(held.blocks)}
            new.encodings[encoding] = _Encoding(held.layout, blocks)

    def sharing(self, memory: MemoryUid, numbers: Sequence[int]) -> list[MemoryUid]:
        """See TenantStore."""
        shown = [n for n in numbers if n in self._memory(memory).documents]
        others = {uid for number in shown for uid in self._sharers(memory, number)}
        return sorted({memory, *others} if shown else others)

    def _sharers(self, memory: MemoryUid, number: int) -> list[MemoryUid]:
        """The memories that show a document of this one, but for itself."""
        owner = self._memory(memory).owners.get(number, memory)
        return [
            uid
            for uid, one in self._memories.items()
            if uid != memory and number in one.documents and one.owners.get(number, uid) == owner
        ]

    def _blocks_of(
        self, memory: MemoryUid, encoding: EncodingId, number: int
    ) -> list[dict[int, KVBlock]]:
        """Where the block of a document is held: by all that share it, under that encoding."""
        shown = number in self._memory(memory).documents
        everyone = [memory, *(self._sharers(memory, number) if shown else ())]
        held = (self._memories[uid].encodings.get(encoding) for uid in everyone)
        return [one.blocks for one in held if one is not None]

    def delete_documents(self, memory: MemoryUid, numbers: Sequence[int]) -> LetGo:
        """See TenantStore."""
        for number in numbers:
            check_number(number)
        if not numbers:
            return LetGo()
        gone = self._let_go_of(memory, set(numbers))
        known = self._memory(memory)
        for number in numbers:
            known.documents.pop(number, None)
            for held in known.encodings.values():
                held.blocks.pop(number, None)
        for encoding in [e for e, held in known.encodings.items() if not held.blocks]:
            del known.encodings[encoding]
        return gone

    def _let_go_of(self, memory: MemoryUid, numbers: Iterable[int]) -> LetGo:
        known = self._memory(memory)
        there = [n for n in numbers if n in known.documents]
        shared = sorted(n for n in there if self._sharers(memory, n))
        blocks = [
            n
            for encoding, held in known.encodings.items()
            for n in set(numbers).intersection(held.blocks)
            if len(self._blocks_of(memory, encoding, n)) == 1
        ]
        return LetGo(len(there) - len(shared), len(blocks), tuple(shared))

    def delete_blocks(
        self, memory: MemoryUid, encoding: EncodingId, numbers: Sequence[int]
    ) -> None:
        """See TenantStore."""
        check_encoding(encoding)
        for number in numbers:
            check_number(number)
            for held in self._blocks_of(memory, encoding, number):
                held.pop(number, None)
        if numbers and not self._blocks(memory, encoding):
            self._memory(memory).encodings.pop(encoding, None)

    def delete_encoding(self, memory: MemoryUid, encoding: EncodingId) -> None:
        """See TenantStore."""
        check_encoding(encoding)
        self._memory(memory).encodings.pop(encoding, None)

    def delete_memory(self, memory: MemoryUid) -> LetGo:
        """See TenantStore."""
        known = self._memory(memory)
        held = (one.blocks for one in known.encodings.values())
        gone = self._let_go_of(memory, known.documents.keys() | set().union(*held))
        del self._memories[memory]
        return gone

    def memories(self) -> list[MemoryUid]:
        """See TenantStore."""
        if self._closed:
            raise StorageError("the store is closed")
        return sorted(uid for uid, m in self._memories.items() if m.documents or m.encodings)

    def encodings(self, memory: MemoryUid) -> list[EncodingId]:
        """See TenantStore."""
        return sorted(self._memory(memory).encodings)

    def check(self) -> Iterator[Finding]:
        """See TenantStore. Dictionaries do not rot, but a block can lack its document."""
        for uid, memory in sorted(self._memories.items()):
            for encoding, held in sorted(memory.encodings.items()):
                for number in sorted(held.blocks.keys() - memory.documents.keys()):
                    key = block_key(uid, Kind.ROUTING, encoding, number)
                    yield Finding(key.hex(), Problem.NO_DOCUMENT, f"document {number} is not there")

    def close(self) -> None:
        """See BlockReader."""
        self._closed = True


def _between(numbers: Iterable[int], first: int, last: int | None) -> list[int]:
    return sorted(n for n in numbers if first <= n and (last is None or n <= last))


def _copy(array: Bits | None) -> Bits | None:
    return None if array is None else array.copy()


def _content(block: KVBlock) -> ContentPart:
    return ContentPart(block.number, _copy(block.key_LCE), block.value_LCE.copy())


def _own(block: KVBlock) -> KVBlock:
    return replace(
        block,
        routing_key_LCE=block.routing_key_LCE.copy(),
        key_LCE=_copy(block.key_LCE),
        value_LCE=block.value_LCE.copy(),
    )
