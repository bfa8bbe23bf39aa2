"""Fingerprints of payloads, by which a repeated request_id is told from a reused one."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from memsvc.v1 import memory_service_pb2 as pb

Fingerprinted = TypeVar(
    "Fingerprinted",
    pb.CreateMemoryRequest,
    pb.AppendTurnsRequest,
    pb.DeleteDocumentsRequest,
    pb.ForkMemoryRequest,
    pb.RestoreMemoryRequest,
)


def message_fingerprint(request: Fingerprinted) -> bytes:
    """SHA-256 of a unary request without its request_id."""
    bare = type(request)()
    bare.CopyFrom(request)
    bare.ClearField("request_id")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


class StreamFingerprint:
    """SHA-256 over the parts of a client stream; parts are kept apart by their lengths."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, part: bytes) -> None:
        """One whole part, not a piece of one."""
        self._hash.update(len(part).to_bytes(8, "big") + part)

    def digest(self) -> bytes:
        """32 bytes."""
        return self._hash.digest()
