"""The envelope around every stored value: what it is, that it is whole, and that it is secret.

Version 1, plain, 48 bytes of header:

  offset  0       4         5      6       7
          | magic | version | kind | codec | 0 |
  offset  8             24       28    32       36  40         48
          | fingerprint | tokens | raw | stored | 0 | checksum | payload ...

Version 2, encrypted, 64 bytes of header; the payload is AES-256-GCM's, its tag at the end:

  offset  0       4         5      6       7
          | magic | version | kind | codec | 0 |
  offset  8             24       28    32       36         44      56         64
          | fingerprint | tokens | raw | stored | revision | nonce | checksum | payload ...

Little-endian. The checksum is xxh3-64 over the payload as stored, seeded with xxh3-64 over
key + header before it: damage is found without any secret. GCM's associated data is
key + header before the nonce: a record that was forged, or put under another key, does
not open. Who has a key refuses plain records, who has none encrypted ones.
docs/format/records.md draws this page.
"""

from __future__ import annotations

import secrets
import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from xxhash import xxh3_64_intdigest

from storage.keys import Kind
from storage.store import (
    CorruptRecordError,
    ForeignRecordError,
    KeyMissingError,
    WrongKeyError,
)

MAGIC = b"MEMR"
#: Of plain records.
FORMAT_VERSION = 1
#: Of encrypted records.
ENCRYPTED_VERSION = 2
HEADER_BYTES = 48
ENCRYPTED_HEADER_BYTES = 64
TAG_BYTES = 16
NONCE_BYTES = 12
FINGERPRINT_BYTES = 16
MAX_PAYLOAD_BYTES = 2**32 - 1
NO_FINGERPRINT = bytes(FINGERPRINT_BYTES)

_CHECKED = struct.Struct("<4sBBBB16sIIII")
_CHECKSUM = struct.Struct("<Q")
_HEADER = struct.Struct("<4sBBBB16sIIIIQ")
_BOUND = struct.Struct("<4sBBBB16sIIIQ")
_ENCRYPTED_HEADER = struct.Struct(f"<4sBBBB16sIIIQ{NONCE_BYTES}sQ")

Buffer = bytes | bytearray | memoryview


class Header(NamedTuple):
    """What a record says about its payload.

    codec: a Codec's number. fingerprint: of model and layout, zeros for a record
    that belongs to no model. tokens: of the document under that model, else 0.
    raw_bytes: of the payload once decoded. revision: that made the record, where its
    kind has one, else 0; kept in encrypted records alone.
    """

    kind: Kind
    codec: int
    raw_bytes: int
    fingerprint: bytes = NO_FINGERPRINT
    tokens: int = 0
    revision: int = 0


class Sealed(NamedTuple):
    """A record whose payload was not opened. Views are valid as long as the value is.

    bound, nonce: empty in a plain record. checked: what the checksum is over beside key and
    body. fault: what is wrong with it though its checksum is right; empty when nothing is.
    """

    key: bytes
    header: Header
    bound: bytes
    nonce: bytes
    body: memoryview
    checked: bytes
    checksum: int
    fault: str

    def verify(self) -> None:
        """Raises CorruptRecordError unless it is as it was written, and of its kind."""
        if self.checksum != xxh3_64_intdigest(
            self.body, xxh3_64_intdigest(self.key + self.checked)
        ):
            raise CorruptRecordError(f"{self.key.hex()}: checksum does not match")
        if self.fault:
            raise CorruptRecordError(f"{self.key.hex()}: {self.fault}")

    def check(self, fingerprint: bytes | None, *, encrypted: bool) -> None:
        """Whether it is what the caller asks for, see `unseal`; of use once it is verified."""
        if encrypted and not self.nonce:
            raise WrongKeyError(f"{self.key.hex()}: a plain record among encrypted ones")
        if fingerprint is not None and self.header.fingerprint != fingerprint:
            raise ForeignRecordError(f"{self.key.hex()}: block of another model or layout")

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload, opened."""
        return len(self.body) - TAG_BYTES if self.nonce else len(self.body)

    def payload(self, cipher: AESGCM | None, into: memoryview | None = None) -> memoryview:
        """The payload: a view of the stored bytes when plain, else a new buffer or `into`,
        which has payload_bytes. Raises WrongKeyError; `into` then holds nothing of worth.
        """
        if cipher is None or not self.nonce:
            return self.body
        target = memoryview(bytearray(self.payload_bytes)) if into is None else into
        try:
            cipher.decrypt_into(self.nonce, self.body, self.bound, target)
        except InvalidTag:
            raise WrongKeyError(f"{self.key.hex()}: does not open under the memory's key") from None
        return target


def seal(key: bytes, header: Header, payload: bytes, cipher: AESGCM | None = None) -> bytes:
    """The value to store under `key`; encrypted when there is a cipher.

    Raises ValueError for a payload over 4 GiB.
    """
    if max(len(payload) + TAG_BYTES, header.raw_bytes) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a record holds at most {MAX_PAYLOAD_BYTES} bytes")
    start = MAGIC, FORMAT_VERSION, header.kind, header.codec, 0, header.fingerprint, header.tokens
    if cipher is None:
        checked = _CHECKED.pack(*start, header.raw_bytes, len(payload), 0)
        checksum = xxh3_64_intdigest(payload, xxh3_64_intdigest(key + checked))
        return b"".join((checked, _CHECKSUM.pack(checksum), payload))
    start = MAGIC, ENCRYPTED_VERSION, *start[2:]
    bound = _BOUND.pack(*start, header.raw_bytes, len(payload) + TAG_BYTES, header.revision)
    nonce = secrets.token_bytes(NONCE_BYTES)
    body = cipher.encrypt(nonce, payload, key + bound)
    checksum = xxh3_64_intdigest(body, xxh3_64_intdigest(key + bound + nonce))
    return b"".join((bound, nonce, _CHECKSUM.pack(checksum), body))


def unseal(
    key: bytes,
    value: Buffer,
    kind: Kind,
    fingerprint: bytes | None = None,
    *,
    encrypted: bool = False,
) -> Sealed:
    """Verifies all that can be without a secret.

    fingerprint: what the caller asks for; None takes any. encrypted: whether the caller
    holds keys. Raises CorruptRecordError, ForeignRecordError, KeyMissingError.
    """
    sealed = look(key, value, kind, encrypted=encrypted)
    sealed.verify()
    sealed.check(fingerprint, encrypted=encrypted)
    return sealed


def look(key: bytes, value: Buffer, kind: Kind, *, encrypted: bool) -> Sealed:
    """What the value says of itself, nothing of it verified yet but its length.

    Raises CorruptRecordError, ForeignRecordError (a format of the future), KeyMissingError.
    """
    head = bytes(value[:ENCRYPTED_HEADER_BYTES])
    if len(head) < HEADER_BYTES:
        raise CorruptRecordError(f"{key.hex()}: {len(value)} bytes are no record")
    if not head.startswith(MAGIC):
        raise CorruptRecordError(f"{key.hex()}: not a record")
    version = head[len(MAGIC)]
    if version == ENCRYPTED_VERSION:
        if not encrypted:
            raise KeyMissingError(f"{key.hex()}: encrypted, and there is no key")
        return _look_encrypted(key, head, memoryview(value), kind)
    if version == FORMAT_VERSION:
        return _look_plain(key, head, memoryview(value), kind)
    raise ForeignRecordError(f"{key.hex()}: format version {version}")


def _look_plain(key: bytes, head: bytes, value: memoryview, kind: Kind) -> Sealed:
    _, _, found, codec, zero, mark, tokens, raw, stored, pad, checksum = _HEADER.unpack_from(head)
    body = _body(key, value[HEADER_BYTES:], stored)
    header = Header(kind, codec, raw, mark, tokens)
    fault = _fault(found, kind, zero or pad)
    return Sealed(key, header, b"", b"", body, head[: _CHECKED.size], checksum, fault)


def _look_encrypted(key: bytes, head: bytes, value: memoryview, kind: Kind) -> Sealed:
    if len(head) < ENCRYPTED_HEADER_BYTES:
        raise CorruptRecordError(f"{key.hex()}: {len(value)} bytes are no record")
    _, _, found, codec, zero, mark, tokens, raw, stored, revision, nonce, checksum = (
        _ENCRYPTED_HEADER.unpack(head)
    )
    body = _body(key, value[ENCRYPTED_HEADER_BYTES:], stored)
    header = Header(kind, codec, raw, mark, tokens, revision)
    fault = _fault(found, kind, zero)
    if not fault and len(body) < TAG_BYTES:
        fault = "no encrypted payload"
    bound, checked = key + head[: _BOUND.size], head[: _BOUND.size + NONCE_BYTES]
    return Sealed(key, header, bound, nonce, body, checked, checksum, fault)


def _body(key: bytes, body: memoryview, stored: int) -> memoryview:
    if stored != len(body):
        raise CorruptRecordError(f"{key.hex()}: {len(body)} bytes, header says {stored}")
    return body


def _fault(found: int, kind: Kind, zeros: int) -> str:
    """A fault here, where the checksum is right, is a writer's and not the disk's."""
    return f"kind {found}, expected {kind.name.lower()}" if found != kind or zeros else ""
