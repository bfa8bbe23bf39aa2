"""Verifies a store's records one after another, in key order, in bounded memory.

Within a memory the order is documents, encodings, routing keys, contents, keys, lineage
(storage/keys.py), so each is known when what depends on it comes by. Kept at a
time: one memory's document numbers and the token counts of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from storage.block_records import (
    Record,
    read_content,
    read_document,
    read_encoding,
    read_routing,
)
from storage.crypto.key_tree import KeyTree
from storage.keys import LINEAGE_KINDS, Kind, RecordKey, block_key, other_side, parse_key
from storage.layout import KVLayout
from storage.layout_json import fingerprint
from storage.records import unseal
from storage.store import (
    CorruptRecordError,
    EncodingId,
    Finding,
    ForeignRecordError,
    KeyMissingError,
    MemoryUid,
    Problem,
)

#: Generation and document keys of a memory; None: it is not encrypted. Raises
#: KeyMissingError, CorruptRecordError.
FindKeys = Callable[[MemoryUid], tuple[int, KeyTree | None]]

#: Layouts of encodings that a memory lacks, of which others made blocks under it.
FindLayouts = Callable[[MemoryUid], Mapping[EncodingId, KVLayout]]


@dataclass
class _Memory:
    """What of one memory was seen so far. Tokens are None where the record is damaged."""

    uid: MemoryUid
    documents: set[int] = field(default_factory=set)
    layouts: dict[EncodingId, KVLayout | None] = field(default_factory=dict)
    routing_tokens: dict[tuple[EncodingId, int], int | None] = field(default_factory=dict)
    keys: KeyTree | None = None
    generation: int = 0
    #: The store is encrypted, and this memory's key is not there.
    keyless: bool = False


def find_problems(
    records: Iterable[Record],
    find_keys: FindKeys = lambda _: (0, None),
    find_layouts: FindLayouts = lambda _: {},
) -> Iterator[Finding]:
    """Findings about records given in key order; none when all are sound.

    Records of a memory without a key are verified
    as far as that goes: their bytes are as they were written.
    """
    memory: _Memory | None = None
    halves: set[bytes] = set()
    for key, value in records:
        try:
            parsed = parse_key(key)
        except ValueError as error:
            yield Finding(key.hex(), Problem.STRAY_KEY, str(error))
            continue
        if memory is None or memory.uid != parsed.memory:
            if memory is not None:
                yield from _without_content(memory)
            memory = _Memory(parsed.memory, layouts=dict(find_layouts(parsed.memory)))
            yield from _take_keys(memory, find_keys)
        yield from _check_record(memory, key, value, parsed)
        other = other_side(parsed)
        if other in halves:
            halves.remove(other)
        elif other is not None:
            halves.add(key)
    if memory is not None:
        yield from _without_content(memory)
    for half in sorted(halves):
        yield Finding(half.hex(), Problem.HALF_LINEAGE, "the other memory does not say so")


def _take_keys(memory: _Memory, find_keys: FindKeys) -> Iterator[Finding]:
    try:
        memory.generation, memory.keys = find_keys(memory.uid)
    except KeyMissingError as error:
        memory.keyless = True
        yield Finding(memory.uid.hex(), Problem.NO_KEY, str(error))
    except CorruptRecordError as error:
        memory.keyless = True
        yield Finding(memory.uid.hex(), Problem.DAMAGED, str(error))


def _check_record(
    memory: _Memory, key: bytes, value: bytes, parsed: RecordKey
) -> Iterator[Finding]:
    expected: int | None = None
    half = (parsed.encoding, parsed.number)
    if parsed.kind in LINEAGE_KINDS:
        yield from _whole(key, value, parsed.kind, encrypted=False)
        return
    if parsed.kind is Kind.DOCUMENT:
        # A damaged text still has its number, so that its blocks are not blamed too.
        memory.documents.add(parsed.number)
    elif parsed.kind is Kind.ENCODING:
        memory.layouts[parsed.encoding] = None
    elif parsed.kind is Kind.ROUTING:
        memory.routing_tokens[half] = None
        yield from _check_routing(memory, key, parsed)
    elif parsed.kind is Kind.KEYS:
        # Of its own generation alone: what a crash left of another opens for nobody.
        if memory.keys is None or parsed.number == memory.generation:
            yield from _whole(key, value, Kind.KEYS, encrypted=True)
        return
    elif half in memory.routing_tokens:
        expected = memory.routing_tokens.pop(half)
    else:
        yield Finding(key.hex(), Problem.HALF_BLOCK, "content without routing keys")
    if memory.keyless:
        yield from _whole(key, value, parsed.kind, encrypted=True)
        return
    try:
        _decode(memory, key, value, parsed, expected)
    except KeyMissingError as error:
        yield Finding(key.hex(), Problem.NO_KEY, str(error))
    except CorruptRecordError as error:
        yield Finding(key.hex(), Problem.DAMAGED, str(error))
    except ForeignRecordError as error:
        yield Finding(key.hex(), Problem.FOREIGN, str(error))


def _whole(key: bytes, value: bytes, kind: Kind, *, encrypted: bool) -> Iterator[Finding]:
    try:
        unseal(key, value, kind, encrypted=encrypted)
    except CorruptRecordError as error:
        yield Finding(key.hex(), Problem.DAMAGED, str(error))
    except ForeignRecordError as error:
        yield Finding(key.hex(), Problem.FOREIGN, str(error))


def _check_routing(memory: _Memory, key: bytes, parsed: RecordKey) -> Iterator[Finding]:
    if parsed.number not in memory.documents:
        yield Finding(key.hex(), Problem.NO_DOCUMENT, f"document {parsed.number} is not there")
    if parsed.encoding not in memory.layouts:
        yield Finding(key.hex(), Problem.NO_LAYOUT, "the encoding's record is not there")


def _decode(
    memory: _Memory, key: bytes, value: bytes, parsed: RecordKey, expected_tokens: int | None
) -> None:
    if parsed.kind is Kind.DOCUMENT:
        read_document(key, value, memory.keys)
        return
    if parsed.kind is Kind.ENCODING:
        memory.layouts[parsed.encoding] = read_encoding(key, value, memory.keys)
        return
    header = unseal(key, value, parsed.kind, encrypted=memory.keys is not None).header
    layout = memory.layouts.get(parsed.encoding)
    if layout is not None:
        read = read_routing if parsed.kind is Kind.ROUTING else read_content
        read(key, value, fingerprint(parsed.encoding, layout), layout, memory.keys)
    if parsed.kind is Kind.ROUTING:
        memory.routing_tokens[parsed.encoding, parsed.number] = header.tokens
    elif expected_tokens not in (None, header.tokens):
        raise CorruptRecordError(
            f"{key.hex()}: content of {header.tokens} tokens, routing keys of {expected_tokens}"
        )


def _without_content(memory: _Memory) -> Iterator[Finding]:
    """What is left over has routing keys and no content."""
    for encoding, number in memory.routing_tokens:
        key = block_key(memory.uid, Kind.ROUTING, encoding, number)
        yield Finding(key.hex(), Problem.HALF_BLOCK, "routing keys without content")
