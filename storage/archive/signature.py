"""The last member of a signed archive: who says that this archive is theirs.

Ed25519 over the bytes of index.json, behind a prefix that no other signature of memsvc has.
The index names every other member with its SHA-256, so the signature covers all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from storage.archive.errors import ArchiveCorruptError, ArchiveSignatureError
from storage.document_json import DocumentFormatError, Fields, dump_json, load_json

_ALGORITHM = "Ed25519"
_CONTEXT = b"msamem index v1\0"
_KEY = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


class Signer(Protocol):
    """Holds an Ed25519 key."""

    @property
    def public_key(self) -> str:
        """64 hex digits."""
        ...

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        ...


@dataclass(frozen=True)
class Signature:
    """Whose key signed; 64 hex digits."""

    public_key: str


def encode_signature(signer: Signer, index: bytes) -> bytes:
    """signature.json for the archive with this index.json."""
    signature = signer.sign(_CONTEXT + index).hex()
    return dump_json(
        {"algorithm": _ALGORITHM, "public_key": signer.public_key, "signature": signature}
    )


def verify_signature(data: bytes, index: bytes) -> Signature:
    """Raises ArchiveSignatureError when it is not of this index, ArchiveCorruptError."""
    try:
        fields = Fields(load_json(data), "signature")
        algorithm = fields.text("algorithm")
        public_key, signature = fields.text("public_key"), fields.text("signature")
        fields.close()
    except DocumentFormatError as error:
        raise ArchiveCorruptError(f"signature.json: {error}") from error
    if not (_KEY.fullmatch(public_key) and _SIGNATURE.fullmatch(signature)):
        raise ArchiveCorruptError("signature.json holds no key or no signature in hex")
    if algorithm != _ALGORITHM:
        raise ArchiveSignatureError(f"signed by {algorithm[:20]!r}, which is not known here")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), _CONTEXT + index)
    except (InvalidSignature, ValueError):
        raise ArchiveSignatureError("the signature is not one of this archive") from None
    return Signature(public_key)
