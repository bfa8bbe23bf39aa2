"""The bytes of a key file: a head with the tenant's wrapped key, then slots of memories' keys.

    head, 4096 bytes: two halves of
      magic "MEMK" | version u8 | 0 x3 | order u32 | name's length u16 | wrapped's length u16
      | name | wrapped | 0 ... | checksum u64
    slot, 256 bytes: two halves of
      memory uid 16 | order u32 | generation u32 | nonce 12 | wrapped 80 | checksum u64 | 0 x4

Little-endian. Of two whole halves the one with the higher order holds. The checksum is
xxh3-64 over what is before it; whether the content is genuine, its encryption says.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from storage.store import StorageError

HEAD_BYTES = 4096
SLOT_BYTES = 256
NONCE_BYTES = 12
EMPTY_SLOT = bytes(SLOT_BYTES)
MAGIC = b"MEMK"
VERSION = 1

_CHECKSUM = struct.Struct("<Q")
_SLOT = struct.Struct(f"<16sII{NONCE_BYTES}s80s")
_HEAD = struct.Struct("<4sB3xIHH")
_MAX_NAME = 64
_MAX_WRAPPED = 1024


class Slot(NamedTuple):
    """One half of a slot. order: counts writes. wrapped: under the tenant's key."""

    memory: bytes
    order: int
    generation: int
    nonce: bytes
    wrapped: bytes

    def pack(self) -> bytes:
        """The half."""
        packed = _SLOT.pack(*self)
        whole = packed + _CHECKSUM.pack(xxh3_64_intdigest(packed))
        return whole.ljust(half_bytes(SLOT_BYTES), b"\0")


class Head(NamedTuple):
    """One half of the head. root: name of the root key. wrapped: what that one gave."""

    order: int
    root: str
    wrapped: bytes

    def pack(self) -> bytes:
        """The half. Raises StorageError for a name or a wrapped key that is too long."""
        name = self.root.encode()
        if len(name) > _MAX_NAME or len(self.wrapped) > _MAX_WRAPPED:
            raise StorageError("the root key's name or what it wrapped is too long")
        packed = _HEAD.pack(MAGIC, VERSION, self.order, len(name), len(self.wrapped))
        body = (packed + name + self.wrapped).ljust(half_bytes(HEAD_BYTES) - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(xxh3_64_intdigest(body))


def half_bytes(size: int) -> int:
    """Of a head or a slot of `size` bytes."""
    return size // 2


def other_half(raw: bytes, half: int) -> bytes:
    """The half that is not number `half` (0 or 1)."""
    size = half_bytes(len(raw))
    return raw[size:] if half == 0 else raw[:size]


def newest_slot(raw: bytes) -> tuple[Slot, int] | None:
    """What a slot holds and which half; None when neither is whole."""
    found: list[tuple[Slot, int]] = []
    size = half_bytes(SLOT_BYTES)
    for half in (0, 1):
        part = raw[half * size : (half + 1) * size]
        end = _SLOT.size
        if len(part) == size and any(part) and _matches(part, end):
            found.append((Slot(*_SLOT.unpack_from(part)), half))
    return max(found, key=lambda one: one[0].order, default=None)


def newest_head(raw: bytes, name: str) -> tuple[Head, int]:
    """What a head holds and which half. name: of the file, for errors. Raises StorageError."""
    found: list[tuple[Head, int]] = []
    size = half_bytes(HEAD_BYTES)
    for half in (0, 1):
        part = raw[half * size : (half + 1) * size]
        if len(part) == size and _matches(part, size - _CHECKSUM.size):
            found.append((_head(part, name), half))
    if not found:
        raise StorageError(f"{name} is no key file, or its head is damaged")
    return max(found, key=lambda one: one[0].order)


def _head(part: bytes, name: str) -> Head:
    magic, version, order, name_bytes, wrapped_bytes = _HEAD.unpack_from(part)
    if magic != MAGIC:
        raise StorageError(f"{name} is no key file")
    if version != VERSION:
        raise StorageError(f"{name} has version {version}, this release knows {VERSION}")
    middle = _HEAD.size + name_bytes
    root = part[_HEAD.size : middle].decode(errors="replace")
    return Head(order, root, part[middle : middle + wrapped_bytes])


def _matches(part: bytes, end: int) -> bool:
    (checksum,) = _CHECKSUM.unpack_from(part, end)
    return bool(checksum == xxh3_64_intdigest(part[:end]))
