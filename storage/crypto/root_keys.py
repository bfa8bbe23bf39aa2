"""The root key: the one secret that is kept outside of the data.

`RootKeys` is what memsvc asks of a key service; a service of a cloud fits behind the same
two calls. `LocalRootKeys` is the one that comes along: keys read from a file or from a
setting, the first of them for wrapping, all of them for unwrapping, so that keys can be
rotated.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.files import sync_folder, write_new

KEY_BYTES = 32
_NONCE_BYTES = 12
_PIECE_BYTES = 2**20
_ID_PERSON = b"memsvc root id"


class RootKeyError(Exception):
    """There is no root key, it is malformed or exposed, or it is not the one that is needed."""


class RootKeys(Protocol):
    """Wraps tenant keys. May block."""

    @property
    def current(self) -> str:
        """Name of the key that `wrap` uses now; at most 64 bytes of UTF-8."""

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """The key encrypted, at most 1 KiB. context: must be the same for unwrapping."""

    def unwrap(self, name: str, wrapped: bytes, context: bytes) -> bytes:
        """name: `current` when it was wrapped. Raises RootKeyError."""


class LocalRootKeys:
    """RootKeys over secrets held in this process. At least one; the first is current."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise RootKeyError(f"a root key has {KEY_BYTES} bytes")
        self._ciphers = {_name(key): AESGCM(key) for key in keys}
        self._current = _name(keys[0])

    @property
    def current(self) -> str:
        """See RootKeys: 16 hex digits of a hash of the key."""
        return self._current

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """See RootKeys. A random nonce: a root key wraps a key per tenant and rotation, far
        fewer than the 2^32 after which 96 random bits are held to be worn.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._ciphers[self._current].encrypt(nonce, key, context)

    def unwrap(self, name: str, wrapped: bytes, context: bytes) -> bytes:
        """See RootKeys."""
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise RootKeyError(f"root key {name} is needed and not given")
        try:
            return cipher.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise RootKeyError(f"what root key {name} wrapped was altered") from error


def _name(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=8, person=_ID_PERSON).hexdigest()


def parse_root_keys(text: str) -> LocalRootKeys:
    """Keys as base64 of 32 bytes, apart by white space or commas. Raises RootKeyError."""
    keys: list[bytes] = []
    for word in text.replace(",", " ").split():
        try:
            keys.append(base64.b64decode(word, validate=True))
        except (binascii.Error, ValueError) as error:
            raise RootKeyError("a root key is not base64") from error
    return LocalRootKeys(keys)


def new_root_key() -> str:
    """A random key as `parse_root_keys` takes it."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def read_root_keys(path: Path) -> LocalRootKeys:
    """Keys of a file that only its owner may read. Raises RootKeyError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RootKeyError(f"no root key: {path.name} cannot be read; run `memsvc init`") from error
    with os.fdopen(handle) as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise RootKeyError(f"{path.name} may be read by others; chmod 600 it")
        try:
            return parse_root_keys(file.read())
        except UnicodeDecodeError as error:
            raise RootKeyError(f"{path.name} is no text") from error


def write_root_keys(path: Path, keys: Sequence[str]) -> None:
    """Writes a key file, mode 0600, durable on return; the earlier one is overwritten first."""
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    write_new(staged, "".join(f"{key}\n" for key in keys).encode())
    old = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if path.exists() else None
    staged.replace(path)
    sync_folder(path.parent)
    if old is not None:
        overwrite(old)


def overwrite(handle: int) -> None:
    """Puts zeros in the place of all a file holds, durably, and closes it."""
    with os.fdopen(handle, "wb") as file:
        left = os.fstat(handle).st_size
        while left > 0:
            left -= file.write(bytes(min(left, _PIECE_BYTES)))
        file.flush()
        os.fsync(handle)
