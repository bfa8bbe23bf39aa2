"""The secret of one memory, and who may be asked for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from storage.crypto.key_tree import KeyTree
from storage.store import KeyMissingError, MemoryUid


class MemorySecret:
    """What opens a memory: a key of 32 bytes, and how often it was replaced. The key is
    overwritten when the last reference to this goes.

    In generation 0 the key is the root of the key tree. Every destruction of document
    keys gives the memory a new key, which then opens a record in the store: the
    tree's nodes that are left. An earlier key, and with it an earlier tree, is gone.
    """

    def __init__(self, key: bytes | bytearray, generation: int) -> None:
        self.key = bytearray(key)
        self.generation = generation
        self._tree: KeyTree | None = None

    def __del__(self) -> None:
        self.key[:] = bytes(len(self.key))

    def tree(self, load: Callable[[MemorySecret], KeyTree]) -> KeyTree:
        """The document keys. load: reads the record of a generation above 0."""
        tree = self._tree
        if tree is None:
            tree = KeyTree.grown_from(self.key) if not self.generation else load(self)
            self._tree = tree
        return tree


class KeySource(Protocol):
    """Gives out keys of one tenant's memories."""

    def of(self, memory: MemoryUid) -> MemorySecret | None:
        """None: the memory is not encrypted. Raises KeyMissingError: its key was never made,
        or destroyed with it.
        """


class NoKeys:
    """KeySource of a tenant whose key file is gone."""

    def of(self, memory: MemoryUid) -> MemorySecret:
        """See KeySource."""
        raise KeyMissingError(f"memory {memory.hex()} has no key: there is no key file")


class KeyKeeper(Protocol):
    """What the writer of a store needs: every memory is encrypted."""

    def of(self, memory: MemoryUid) -> MemorySecret:
        """See KeySource."""

    def create(self, memory: MemoryUid) -> None:
        """Makes a random key, durable on return; one that is there already stays."""

    def replace(self, memory: MemoryUid, secret: bytes, generation: int) -> None:
        """Puts a new secret in the place of the old one, which is destroyed on return."""

    def destroy(self, memory: MemoryUid) -> None:
        """Destroys the memory's key; none being there is no error."""
