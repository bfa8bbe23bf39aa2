"""Keys of a tenant's records: fixed width, big-endian, in the order they are read.

  offset  0        16     17            33        41
          | memory | kind | encoding     | number  |      (for INHERITED, LENT: a memory)

Byte order is read order: a memory's documents, an encoding's routing keys and
an encoding's contents are each one range, and so is everything of a memory.
docs/format/records.md draws this page.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from storage.store import EncodingId, MemoryUid

KEY_BYTES = 41
UID_BYTES = 16
MAX_NUMBER = 2**63 - 1

_KEY = struct.Struct(">16sB16sQ")
_NO_ENCODING = bytes(UID_BYTES)


class Kind(IntEnum):
    """What a record holds. Numbers are never reused."""

    DOCUMENT = 1
    ENCODING = 2
    ROUTING = 3
    CONTENT = 4
    KEYS = 5
    INHERITED = 6
    LENT = 7
    HIDDEN = 8


#: Say all in their keys (storage/lineage.py); plain in every store.
LINEAGE_KINDS = (Kind.INHERITED, Kind.LENT, Kind.HIDDEN)
_OF_NO_MODEL = (Kind.DOCUMENT, Kind.KEYS, Kind.HIDDEN)
_MAYBE_ZERO = (Kind.ENCODING, Kind.HIDDEN, Kind.INHERITED, Kind.LENT)


@dataclass(frozen=True)
class RecordKey:
    """A key, taken apart."""

    memory: MemoryUid
    kind: Kind
    encoding: EncodingId
    number: int


def check_memory(memory: bytes) -> None:
    """Raises ValueError unless `memory` can name a memory."""
    if len(memory) != UID_BYTES:
        raise ValueError(f"a memory uid has {UID_BYTES} bytes, not {len(memory)}")


def check_encoding(encoding: bytes) -> None:
    """Raises ValueError unless `encoding` can name an encoding."""
    if len(encoding) != UID_BYTES:
        raise ValueError(f"an encoding id has {UID_BYTES} bytes, not {len(encoding)}")
    if encoding == _NO_ENCODING:
        raise ValueError("the encoding id of zeros means that there is none")


def check_number(number: int) -> None:
    """Raises ValueError unless `number` can be a document's."""
    if not 1 <= number <= MAX_NUMBER:
        raise ValueError(f"a document number lies in 1..{MAX_NUMBER}, not {number}")


def document_key(memory: MemoryUid, number: int) -> bytes:
    """Key of a source document."""
    check_memory(memory)
    check_number(number)
    return _KEY.pack(memory, Kind.DOCUMENT, _NO_ENCODING, number)


def encoding_key(memory: MemoryUid, encoding: EncodingId) -> bytes:
    """Key of an encoding's own record, its layout."""
    check_memory(memory)
    check_encoding(encoding)
    return _KEY.pack(memory, Kind.ENCODING, encoding, 0)


def block_key(memory: MemoryUid, kind: Kind, encoding: EncodingId, number: int) -> bytes:
    """Key of one half of a block: kind is ROUTING or CONTENT."""
    check_memory(memory)
    check_encoding(encoding)
    check_number(number)
    return _KEY.pack(memory, kind, encoding, number)


def keys_key(memory: MemoryUid, generation: int) -> bytes:
    """Key of what is left of a memory's key tree; generation counts from 1."""
    check_memory(memory)
    check_number(generation)
    return _KEY.pack(memory, Kind.KEYS, _NO_ENCODING, generation)


def lineage_key(memory: MemoryUid, kind: Kind, other: MemoryUid, last: int) -> bytes:
    """Key that says what `memory` has inherited from, or lent to, another up to a number."""
    check_memory(memory)
    check_memory(other)
    return _KEY.pack(memory, kind, other, last)


def other_side(key: RecordKey) -> bytes | None:
    """Key of the LENT record of an INHERITED one, and the other way round; None of others."""
    sides = {Kind.INHERITED: Kind.LENT, Kind.LENT: Kind.INHERITED}
    if key.kind not in sides:
        return None
    return _KEY.pack(key.encoding, sides[key.kind], key.memory, key.number)


def hidden_key(memory: MemoryUid, number: int) -> bytes:
    """Key that hides a shared document from a memory; 0: everything, the memory is deleted."""
    check_memory(memory)
    return _KEY.pack(memory, Kind.HIDDEN, _NO_ENCODING, number)


@dataclass(frozen=True)
class KeyRange:
    """Keys from `first` to `last`, both included; empty when last < first."""

    first: bytes
    last: bytes

    def after(self, key: bytes) -> KeyRange:
        """What of the range lies behind `key`."""
        return KeyRange(key + b"\x00", self.last)


def number_range(
    memory: MemoryUid, kind: Kind, encoding: EncodingId | None, first: int, last: int | None
) -> KeyRange:
    """Records of one kind with first <= number <= last; None is no upper end."""
    check_memory(memory)
    if encoding is not None:
        check_encoding(encoding)
    name = encoding or _NO_ENCODING
    low = min(max(first, 0), MAX_NUMBER)
    high = MAX_NUMBER if last is None else min(last, MAX_NUMBER)
    if high < low or first > MAX_NUMBER:  # An empty range: its end lies before its start.
        return KeyRange(_KEY.pack(memory, kind, name, 1), _KEY.pack(memory, kind, name, 0))
    return KeyRange(_KEY.pack(memory, kind, name, low), _KEY.pack(memory, kind, name, high))


def kind_range(memory: MemoryUid, kind: Kind) -> KeyRange:
    """Every record of one kind in a memory, all encodings."""
    check_memory(memory)
    prefix = memory + bytes([kind])
    rest = KEY_BYTES - len(prefix)
    return KeyRange(prefix + b"\x00" * rest, prefix + b"\xff" * rest)


def memory_range(memory: MemoryUid) -> KeyRange:
    """Everything of a memory."""
    check_memory(memory)
    rest = KEY_BYTES - UID_BYTES
    return KeyRange(memory + b"\x00" * rest, memory + b"\xff" * rest)


def everything() -> KeyRange:
    """Every possible key."""
    return KeyRange(b"\x00" * KEY_BYTES, b"\xff" * KEY_BYTES)


def number_of(key: bytes | memoryview) -> int:
    """The number in a key that is known to be whole."""
    return int.from_bytes(key[33:41], "big")


def related_keys(key: RecordKey) -> list[bytes]:
    """The records by which one is judged, itself included, in key order."""
    if key.kind in LINEAGE_KINDS:
        own = _KEY.pack(key.memory, key.kind, key.encoding, key.number)
        other = other_side(key)
        return [own] if other is None else sorted((own, other))
    if key.kind is Kind.DOCUMENT:
        return [document_key(key.memory, key.number)]
    if key.kind is Kind.KEYS:
        return [keys_key(key.memory, key.number)]
    layout = encoding_key(key.memory, key.encoding)
    if key.kind is Kind.ENCODING:
        return [layout]
    halves = (Kind.ROUTING, Kind.CONTENT)
    return [
        document_key(key.memory, key.number),
        layout,
        *(block_key(key.memory, kind, key.encoding, key.number) for kind in halves),
    ]


def parse_key(key: bytes) -> RecordKey:
    """Raises ValueError for bytes that no function here makes."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"key of {len(key)} bytes")
    memory, kind, encoding, number = _KEY.unpack(key)
    parsed = RecordKey(MemoryUid(memory), Kind(kind), EncodingId(encoding), number)
    if parsed.kind in _OF_NO_MODEL:
        if encoding != _NO_ENCODING:
            raise ValueError(f"the key of a {parsed.kind.name.lower()} record names an encoding")
    else:
        check_encoding(encoding)
    if parsed.kind is Kind.ENCODING and number:
        raise ValueError("an encoding's key has a number")
    if number or parsed.kind not in _MAYBE_ZERO:
        check_number(number)
    return parsed
