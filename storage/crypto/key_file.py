"""A tenant's key file: its own key, and one slot for each of its memories.

Destroying a key means overwriting it where it lies. A database cannot promise that: pages
are copied on write, logs are kept. So keys lie in a plain file of fixed slots that are
overwritten in place and flushed. Each slot has two halves: a new content goes into the
free half first and the other one is overwritten after, so a crash leaves one that is whole.
docs/format/keys-at-rest.md draws the bytes.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.crypto.key_slots import (
    EMPTY_SLOT,
    HEAD_BYTES,
    NONCE_BYTES,
    SLOT_BYTES,
    Head,
    Slot,
    half_bytes,
    newest_head,
    newest_slot,
    other_half,
)
from storage.crypto.memory_secret import KeySource, MemorySecret, NoKeys
from storage.crypto.root_keys import KEY_BYTES, RootKeyError, RootKeys, overwrite
from storage.failpoints import Failpoint, reach
from storage.files import disk_error, sync_folder
from storage.store import KeyMissingError, MemoryUid, StoreNotFoundError, TenantRemovedError

_CACHED = 1024
_TENANT_CONTEXT = b"memsvc tenant key "
_MEMORY_CONTEXT = b"memsvc memory key "
_SECRET_BYTES = 2 * KEY_BYTES


class TenantKeys:
    """KeyKeeper on a file. Threads may share it; one process writes, others open it readonly
    and see what was written when they ask.

    Raises at opening: StoreNotFoundError (not there and not `create`), StorageError,
    RootKeyError.
    """

    def __init__(
        self,
        path: Path,
        tenant: str,
        root: RootKeys,
        *,
        create: bool = False,
        readonly: bool = False,
    ) -> None:
        self._path = path
        self._tenant = bytes.fromhex(tenant)
        self._root = root
        self._readonly = readonly
        self._lock = threading.RLock()
        self._places: dict[MemoryUid, int] = {}
        self._free: list[int] = []
        self._cache: OrderedDict[MemoryUid, MemorySecret] = OrderedDict()
        self._destroyed = False
        if create and not path.exists():
            self._make()
        self._load()

    def of(self, memory: MemoryUid) -> MemorySecret:
        """See KeySource. Raises StorageError when the file was altered."""
        with self._lock:
            known = self._cache.get(memory)
            if known is None:
                slot = self._slot(memory)
                secret = self._open(slot)
                known = MemorySecret(secret[:KEY_BYTES], slot.generation)
                if self._readonly:
                    return known
                self._cache[memory] = known
                if len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(memory)
            return known

    def find(self, memory: MemoryUid) -> MemorySecret | None:
        """As `of`, and None for a memory that has no key. Raises KeyMissingError for one
        whose key is damaged.
        """
        with self._lock:
            return self.of(memory) if memory in self._places else None

    def fields(self, memory: MemoryUid) -> AESGCM:
        """Encrypts what the catalog holds of a memory; lives and dies with the memory's key.

        Raises KeyMissingError.
        """
        with self._lock:
            return AESGCM(self._open(self._slot(memory))[KEY_BYTES:])

    def tenant_fields(self) -> bytes:
        """32 bytes that keys of the tenant's own rows in the catalog are derived from."""
        return bytes(self._fields_key)

    def memories(self) -> list[MemoryUid]:
        """Memories that have a key."""
        with self._lock:
            return sorted(self._places)

    def create(self, memory: MemoryUid) -> None:
        """See KeyKeeper. Raises TenantRemovedError."""
        with self._lock:
            if self._destroyed:
                raise TenantRemovedError(f"the keys at {self._path.name} were destroyed")
            if memory in self._places:
                return
            place = self._free[-1] if self._free else self._end()
            slot = self._sealed(memory, 0, 0, secrets.token_bytes(_SECRET_BYTES))
            self._write(place, slot.pack() + bytes(half_bytes(SLOT_BYTES)))
            if self._free:
                self._free.pop()
            self._places[memory] = place

    def replace(self, memory: MemoryUid, secret: bytes, generation: int) -> None:
        """See KeyKeeper. Raises KeyMissingError."""
        with self._lock:
            slot = self._slot(memory)
            both = bytes(secret) + self._open(slot)[KEY_BYTES:]
            self._put(memory, self._sealed(memory, slot.order + 1, generation, both))
            self._cache.pop(memory, None)

    def destroy(self, memory: MemoryUid) -> None:
        """See KeyKeeper."""
        with self._lock:
            place = self._places.get(memory)
            if place is not None:
                self._write(place, EMPTY_SLOT)
                del self._places[memory]
                self._free.append(place)
            self._cache.pop(memory, None)

    def destroy_all(self) -> None:
        """Overwrites and removes the file: no key of the tenant is left."""
        with self._lock:
            self._destroyed = True
            destroy_key_file(self._path)
            self._places.clear()
            self._free.clear()
            self._cache.clear()

    def rewrap(self) -> None:
        """Wraps the tenant's key with the root key that is current now; no data is touched."""
        with self._lock, self._path.open("r+b") as file:
            raw = file.read(HEAD_BYTES)
            head, half = newest_head(raw, self._path.name)
            new = self._head(head.order + 1)
            _write_halves(file.fileno(), 0, HEAD_BYTES, new.pack(), half)

    def renew(self) -> None:
        """Gives the tenant a new key and wraps every memory's key with it; no data is touched."""
        with self._lock:
            opened = {memory: self._slot(memory) for memory in self._places}
            plain = {memory: self._open(slot) for memory, slot in opened.items()}
            fields = bytes(self._fields_key)
            self._set_key(secrets.token_bytes(KEY_BYTES) + fields)
            slots = [
                self._sealed(memory, slot.order + 1, slot.generation, plain[memory])
                for memory, slot in opened.items()
            ]
            self._rewrite(slots)
            self._load()

    # The file.

    def _make(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._set_key(secrets.token_bytes(_SECRET_BYTES))
        self._rewrite([])

    def _set_key(self, secret: bytes) -> None:
        self._secret = bytearray(secret)
        self._cipher = AESGCM(secret[:KEY_BYTES])
        self._fields_key = bytearray(secret[KEY_BYTES:])

    def _head(self, order: int) -> Head:
        context = _TENANT_CONTEXT + self._tenant
        wrapped = self._root.wrap(bytes(self._secret), context)
        return Head(order, self._root.current, wrapped)

    def _rewrite(self, slots: list[Slot]) -> None:
        """A whole new file in the place of the old one, whose bytes are overwritten after."""
        staged = self._path.with_name(f".{self._path.name}.new")
        staged.unlink(missing_ok=True)
        try:
            old = os.open(self._path, os.O_RDWR | os.O_CLOEXEC) if self._path.exists() else None
            handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(self._head(0).pack() + bytes(half_bytes(HEAD_BYTES)))
                for slot in slots:
                    file.write(slot.pack() + bytes(half_bytes(SLOT_BYTES)))
                file.flush()
                os.fsync(handle)
            staged.replace(self._path)
            sync_folder(self._path.parent)
            if old is not None:
                overwrite(old)
        except OSError as error:
            raise disk_error(error, "the key file cannot be written") from error

    def _load(self) -> None:
        tidy = not self._readonly
        try:
            with self._path.open("r+b" if tidy else "rb") as file:
                raw = file.read()
                self._unwrap(raw[:HEAD_BYTES])
                self._places.clear()
                self._free.clear()
                self._cache.clear()
                for place in range(HEAD_BYTES, len(raw) - SLOT_BYTES + 1, SLOT_BYTES):
                    self._index(file.fileno(), place, raw[place : place + SLOT_BYTES], tidy=tidy)
        except FileNotFoundError:
            raise StoreNotFoundError(f"no keys at {self._path.name}") from None
        except OSError as error:
            raise disk_error(error, "the key file cannot be read") from error

    def _unwrap(self, raw: bytes) -> None:
        head, _ = newest_head(raw, self._path.name)
        secret = self._root.unwrap(head.root, head.wrapped, _TENANT_CONTEXT + self._tenant)
        if len(secret) != _SECRET_BYTES:
            raise RootKeyError("the root key gave back no tenant key")
        self._set_key(secret)

    def _index(self, handle: int, place: int, raw: bytes, *, tidy: bool) -> None:
        if raw == EMPTY_SLOT:
            self._free.append(place)
            return
        found = newest_slot(raw)
        if found is None:
            return  # Damaged: neither used nor given out again. The memory's key is missing.
        slot, half = found
        self._places[MemoryUid(slot.memory)] = place
        if tidy and any(other_half(raw, half)):
            # A crash came between writing the new half and overwriting the old one.
            size = half_bytes(SLOT_BYTES)
            os.pwrite(handle, bytes(size), place + (1 - half) * size)
            os.fdatasync(handle)

    def _slot(self, memory: MemoryUid) -> Slot:
        if self._readonly and memory not in self._places:
            self._load()  # It may have been made meanwhile.
        place = self._places.get(memory)
        if place is None:
            raise KeyMissingError(f"memory {memory.hex()} has no key")
        found = newest_slot(self._read(place))
        if found is None or found[0].memory != memory:
            raise KeyMissingError(f"the key of memory {memory.hex()} is damaged")
        return found[0]

    def _sealed(self, memory: MemoryUid, order: int, generation: int, secret: bytes) -> Slot:
        nonce = secrets.token_bytes(NONCE_BYTES)
        slot = Slot(memory, order, generation, nonce, b"")
        wrapped = self._cipher.encrypt(nonce, secret, self._context(slot))
        return slot._replace(wrapped=wrapped)

    def _open(self, slot: Slot) -> bytes:
        try:
            return self._cipher.decrypt(slot.nonce, slot.wrapped, self._context(slot))
        except InvalidTag:
            raise KeyMissingError(f"the key of memory {slot.memory.hex()} was altered") from None

    def _context(self, slot: Slot) -> bytes:
        numbers = slot.order.to_bytes(4, "little") + slot.generation.to_bytes(4, "little")
        return _MEMORY_CONTEXT + self._tenant + slot.memory + numbers

    def _put(self, memory: MemoryUid, slot: Slot) -> None:
        place = self._places[memory]
        found = newest_slot(self._read(place))
        half = found[1] if found else 0
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _write_halves(handle, place, SLOT_BYTES, slot.pack(), half)
            finally:
                os.close(handle)
        except OSError as error:
            raise disk_error(error, "the key file cannot be written") from error

    def _read(self, place: int) -> bytes:
        try:
            with self._path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), SLOT_BYTES, place)
        except OSError as error:
            raise disk_error(error, "the key file cannot be read") from error

    def _write(self, place: int, data: bytes) -> None:
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.pwrite(handle, data, place)
                os.fdatasync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise disk_error(error, "the key file cannot be written") from error

    def _end(self) -> int:
        size = self._path.stat().st_size
        # What a crash cut short of a slot is written over.
        return HEAD_BYTES + (size - HEAD_BYTES) // SLOT_BYTES * SLOT_BYTES


def destroy_key_file(path: Path) -> None:
    """Overwrites and removes a tenant's key file; not there is no error."""
    with suppress(FileNotFoundError):
        overwrite(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        path.unlink()
        sync_folder(path.parent)


def open_keys(path: Path, tenant: str, root: RootKeys) -> KeySource:
    """A tenant's keys to read with, beside a server or without one.

    Without a file every memory's key is missing. Raises StorageError, RootKeyError.
    """
    try:
        return TenantKeys(path, tenant, root, readonly=True)
    except StoreNotFoundError:
        return NoKeys()


def _write_halves(handle: int, place: int, size: int, data: bytes, used: int) -> None:
    """Writes into the half that is not `used`, then overwrites that one, each durably."""
    half = size // 2
    os.pwrite(handle, data, place + (1 - used) * half)
    os.fdatasync(handle)
    reach(Failpoint.KEY_HALF_WRITTEN)
    os.pwrite(handle, bytes(half), place + used * half)
    os.fdatasync(handle)
