"""A key for every document of a memory, from one secret, of which single ones can be destroyed.

A binary tree over the document numbers 0 to 2^63 - 1. A node's two children are the halves
of BLAKE2b-512 keyed with the node, so whoever holds a node has every key below it and
none beside it. A memory starts with the root. Destroying a document's key replaces the node
above it by the siblings along the path down to it: every other key is still there, and that
one can no longer be computed (the construction of Goldreich, Goldwasser and Micali, 1986,
as a puncturable function).

Number 0 is no document: its key is that of what belongs to an encoding as a whole.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.store import CorruptRecordError, KeyMissingError

SECRET_BYTES = 32
#: The root covers numbers below 2 ** ROOT_HEIGHT.
ROOT_HEIGHT = 63
_ENTRY = struct.Struct(f"<BQ{SECRET_BYTES}s")
_PERSON = b"memsvc key tree"
#: Derived nodes kept: a scan then computes one hash a document, a single read some twenty.
_MAX_DERIVED = 8192

#: (height, index): covers the numbers from index << height, 1 << height of them.
Node = tuple[int, int]


class KeyTree:
    """The document keys of one memory. Threads may share it; it is never changed.

    Its secrets are overwritten when the last reference goes; what Python copied of
    them while deriving keys is not.
    """

    def __init__(self, nodes: Mapping[Node, bytes | bytearray]) -> None:
        self._nodes = {node: bytearray(secret) for node, secret in nodes.items()}
        # A tree of which nothing was destroyed has its root alone.
        self._heights = sorted({height for height, _ in self._nodes})
        self._derived: dict[Node, bytes] = {}

    @classmethod
    def grown_from(cls, secret: bytes | bytearray) -> KeyTree:
        """The whole tree under a root of 32 bytes."""
        return cls({(ROOT_HEIGHT, 0): secret})

    def __del__(self) -> None:
        for secret in self._nodes.values():
            secret[:] = bytes(len(secret))

    def cipher(self, number: int) -> AESGCM:
        """The document's AES-256-GCM. Raises KeyMissingError when its key was destroyed."""
        return AESGCM(self._leaf(number))

    def holds(self, number: int) -> bool:
        """Whether the document's key can be computed."""
        return any((height, number >> height) in self._nodes for height in self._heights)

    def without(self, numbers: Iterable[int]) -> KeyTree:
        """A tree that lacks the keys of these documents."""
        nodes: dict[Node, bytes | bytearray] = dict(self._nodes)
        for number in numbers:
            top = self._above(number, nodes)
            if top is None:
                continue
            height, secret = top, nodes.pop((top, number >> top))
            while height:
                left, right = _children(secret)
                height -= 1
                index = number >> height
                nodes[height, index ^ 1] = left if index & 1 else right
                secret = right if index & 1 else left
        return KeyTree(nodes)

    def within(self, first: int, last: int) -> KeyTree:
        """A tree that has the keys from `first` to `last`, both included, and no others."""
        kept: dict[Node, bytes | bytearray] = {}
        left: list[tuple[Node, bytes | bytearray]] = list(self._nodes.items())
        while left:
            (height, index), secret = left.pop()
            low, high = index << height, ((index + 1) << height) - 1
            if first <= low and high <= last:
                kept[height, index] = secret
            elif low <= last and first <= high:
                for half, child in enumerate(_children(secret)):
                    left.append(((height - 1, 2 * index + half), child))
        return KeyTree(kept)

    def joined(self, other: KeyTree) -> KeyTree:
        """A tree with the keys of both. Where both have a key it must be the same one."""
        return KeyTree({**self._nodes, **other._nodes})

    def with_new(self, numbers: Iterable[int]) -> KeyTree:
        """A tree with a fresh random key for those of these documents whose key was destroyed."""
        fresh = {(0, n): secrets.token_bytes(SECRET_BYTES) for n in numbers if not self.holds(n)}
        return KeyTree({**self._nodes, **fresh})

    def encode(self) -> bytes:
        """The nodes, sorted: height u8, index u64, 32 bytes of secret, little-endian."""
        return b"".join(
            _ENTRY.pack(height, index, bytes(secret))
            for (height, index), secret in sorted(self._nodes.items())
        )

    @classmethod
    def decode(cls, data: bytes) -> KeyTree:
        """Raises CorruptRecordError for what `encode` does not make."""
        if len(data) % _ENTRY.size:
            raise CorruptRecordError("a key tree of broken entries")
        nodes = {(height, index): key for height, index, key in _ENTRY.iter_unpack(data)}
        if any(h > ROOT_HEIGHT or index >> (ROOT_HEIGHT - h) for h, index in nodes):
            raise CorruptRecordError("a key tree with a node outside of the numbers")
        return cls(nodes)

    @staticmethod
    def _above(number: int, nodes: Mapping[Node, bytes | bytearray]) -> int | None:
        """Height of the node in `nodes` that covers the number."""
        for height in range(ROOT_HEIGHT + 1):
            if (height, number >> height) in nodes:
                return height
        return None

    def _leaf(self, number: int) -> bytes:
        # The other leaf of a pair is kept when the first one is asked for.
        known = self._derived.pop((0, number), None)
        if known is not None:
            return known
        nodes, derived = self._nodes, self._derived
        for height in range(ROOT_HEIGHT + 1):
            node = (height, number >> height)
            secret = derived.get(node) or nodes.get(node)
            if secret is not None:
                return self._descend(number, height, bytes(secret))
        raise KeyMissingError(f"the key of document {number} was destroyed")

    def _descend(self, number: int, height: int, secret: bytes) -> bytes:
        derived = self._derived
        if len(derived) > _MAX_DERIVED:
            derived.clear()
        while height:
            left, right = _children(secret)
            height -= 1
            index = number >> height
            secret, other = (right, left) if index & 1 else (left, right)
            derived[height, index ^ 1] = other
            if height:
                derived[height, index] = secret
        return secret


def _children(secret: bytes | bytearray) -> tuple[bytes, bytes]:
    digest = hashlib.blake2b(key=secret, digest_size=2 * SECRET_BYTES, person=_PERSON).digest()
    return digest[:SECRET_BYTES], digest[SECRET_BYTES:]
