"""Keys of the memories that a worker holds: they come with a question and go with the memory."""

from __future__ import annotations

import threading

from model_adapter.residency import MemoryKey
from storage.crypto import KeySource, MemorySecret
from storage.store import KeyMissingError, MemoryUid


class HeldKeys:
    """Secrets by memory. Thread-safe. A secret is overwritten when nothing reads with it any more.

    None stands for a memory that is not encrypted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[MemoryKey, MemorySecret | None] = {}

    def hold(self, name: MemoryKey, secret: MemorySecret | None) -> None:
        """Keeps a secret; an earlier generation gives way, a later one stays."""
        with self._lock:
            held = self._held.get(name)
            if held is None or (secret is not None and secret.generation > held.generation):
                self._held[name] = secret

    def drop(self, name: MemoryKey) -> None:
        """Forgets it; not being there is no error."""
        with self._lock:
            self._held.pop(name, None)

    def get(self, name: MemoryKey) -> MemorySecret | None:
        """Raises KeyMissingError for a memory that is not held."""
        with self._lock:
            if name not in self._held:
                raise KeyMissingError("the worker does not hold the memory's key")
            return self._held[name]

    def names(self) -> set[MemoryKey]:
        """Memories whose keys are held."""
        with self._lock:
            return set(self._held)

    def tenant(self, tenant: str) -> KeySource:
        """What a reader of the tenant's store asks."""
        return _OfTenant(self, tenant)


class _OfTenant:
    def __init__(self, keys: HeldKeys, tenant: str) -> None:
        self._keys = keys
        self._tenant = tenant

    def of(self, memory: MemoryUid) -> MemorySecret | None:
        """See KeySource."""
        return self._keys.get(MemoryKey(self._tenant, memory.hex()))
