"""The envelope around every stored value: what it is, and that it is whole.

  offset  0       4         5      6       7
          | magic | version | kind | codec | 0 |
  offset  8             24       28    32       36  40         48
          | fingerprint | tokens | raw | stored | 0 | checksum | payload ...

Little-endian. The checksum is xxh3-64 over the payload, seeded with xxh3-64 over
key + header before it: a record that was altered, cut, or put under another key
is detected. 48 bytes, so that payloads of several pages, which LMDB 0.9 puts 16
bytes into a page, begin on a cache line.
docs/format/records.md draws this page.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from storage.keys import Kind
from storage.store import CorruptRecordError, ForeignRecordError

MAGIC = b"MEMR"
FORMAT_VERSION = 1
HEADER_BYTES = 48
FINGERPRINT_BYTES = 16
MAX_PAYLOAD_BYTES = 2**32 - 1
NO_FINGERPRINT = bytes(FINGERPRINT_BYTES)

_CHECKED = struct.Struct("<4sBBBB16sIIII")
_CHECKSUM = struct.Struct("<Q")
_HEADER = struct.Struct("<4sBBBB16sIIIIQ")

Buffer = bytes | bytearray | memoryview


class Header(NamedTuple):
    """What a record says about its payload.

    codec: a Codec's number. fingerprint: of model and layout, zeros for a record
    that belongs to no model. tokens: of the document under that model, else 0.
    raw_bytes: of the payload once decoded.
    """

    kind: Kind
    codec: int
    raw_bytes: int
    fingerprint: bytes = NO_FINGERPRINT
    tokens: int = 0


def seal(key: bytes, header: Header, payload: bytes) -> bytes:
    """The value to store under `key`. Raises ValueError for a payload over 4 GiB."""
    if max(len(payload), header.raw_bytes) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a record holds at most {MAX_PAYLOAD_BYTES} bytes")
    checked = _CHECKED.pack(
        MAGIC,
        FORMAT_VERSION,
        header.kind,
        header.codec,
        0,
        header.fingerprint,
        header.tokens,
        header.raw_bytes,
        len(payload),
        0,
    )
    checksum = xxh3_64_intdigest(payload, xxh3_64_intdigest(key + checked))
    return b"".join((checked, _CHECKSUM.pack(checksum), payload))


def unseal(
    key: bytes, value: Buffer, kind: Kind, fingerprint: bytes | None = None
) -> tuple[Header, memoryview]:
    """The verified header and a view of the payload, valid as long as `value` is.

    fingerprint: what the caller asks for; None takes any. Raises CorruptRecordError,
    ForeignRecordError.
    """
    head = bytes(value[:HEADER_BYTES])
    if len(head) < HEADER_BYTES:
        raise CorruptRecordError(f"{key.hex()}: {len(value)} bytes are no record")
    magic, version, found, codec, zero, mark, tokens, raw, stored, pad, checksum = _HEADER.unpack(
        head
    )
    if magic != MAGIC:
        raise CorruptRecordError(f"{key.hex()}: not a record")
    if version != FORMAT_VERSION:
        raise ForeignRecordError(f"{key.hex()}: format version {version}")
    payload = memoryview(value)[HEADER_BYTES:]
    if stored != len(payload):
        raise CorruptRecordError(f"{key.hex()}: {len(payload)} bytes, header says {stored}")
    if checksum != xxh3_64_intdigest(payload, xxh3_64_intdigest(key + head[: _CHECKED.size])):
        raise CorruptRecordError(f"{key.hex()}: checksum does not match")
    # What follows is as it was written: a fault here is a writer's, not the disk's.
    if found != kind or zero or pad:
        raise CorruptRecordError(f"{key.hex()}: kind {found}, expected {kind.name.lower()}")
    if fingerprint is not None and mark != fingerprint:
        raise ForeignRecordError(f"{key.hex()}: block of another model or layout")
    return Header(kind, codec, raw, mark, tokens), payload
