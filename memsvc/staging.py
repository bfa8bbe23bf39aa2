"""Staging files: archives on their way in or out.

A staging file has a random name, is readable by this user alone, and is gone
when its with block ends, however it ends. An export lies in it encrypted, under a key
that is in this process's memory alone; an import, which is read here and there, lies in it
as it came, and is overwritten before it is removed. What a killed process leaves behind is
overwritten and removed when the data folder is taken hold of again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from memsvc import errors
from memsvc.config import MIB
from memsvc.errors import ApiError
from memsvc.limits import FairPool
from memsvc.v1.errors_pb2 import ErrorReason
from storage.crypto.root_keys import overwrite
from storage.paths import DataFolder

#: Most bytes of one archive that are taken in.
MAX_ARCHIVE_BYTES = 64 * 1024 * MIB
#: Archives on their way at once, in and out; a tenant alone gets half of it.
MAX_AT_ONCE = 4
_SHARE = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """The staging folder of one server, and how much of it may be used at once."""

    def __init__(self, data: DataFolder, at_once: int = MAX_AT_ONCE) -> None:
        self._folder = data.staging
        self._places = FairPool(at_once, _SHARE)

    @asynccontextmanager
    async def path(self, tenant_uid: str) -> AsyncIterator[Path]:
        """A name in the folder that nothing has yet. Raises OVERLOADED."""
        self._places.take(tenant_uid)
        path = self._folder / f"{secrets.token_hex(16)}.msamem"
        try:
            yield path
        finally:
            self._places.give(tenant_uid)
            await asyncio.shield(asyncio.to_thread(destroy, path))


def destroy(path: Path) -> None:
    """Overwrites and removes a file; none being there is no error."""
    with suppress(FileNotFoundError):
        overwrite(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        path.unlink()


def _stream() -> Cipher[modes.CTR]:
    return Cipher(algorithms.AES256(secrets.token_bytes(32)), modes.CTR(bytes(16)))


class StagingKey:
    """Encrypts one staged file: AES-256-CTR under a random key that is used once and never kept.

    A stream cipher without a tag is enough: an archive proves by itself that it is whole.
    """

    def __init__(self) -> None:
        self._cipher = _stream()

    def encrypted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces as they are to lie in the file. Each call takes another key."""
        self._cipher = _stream()
        return map(self._cipher.encryptor().update, pieces)

    def opener(self) -> Callable[[bytes], bytes]:
        """Turns the file's bytes back, piece by piece from its start."""
        return self._cipher.decryptor().update


class Incoming:
    """An archive being received into a file. Bounded by max_bytes."""

    def __init__(self, path: Path, max_bytes: int = MAX_ARCHIVE_BYTES) -> None:
        self._file: BinaryIO = os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb"
        )
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size = 0

    async def write(self, data: bytes) -> None:
        """Adds a piece. Raises ARCHIVE_FORBIDDEN past the limit, STORAGE_FULL."""
        self.size += len(data)
        if self.size > self._max_bytes:
            raise ApiError(
                ErrorReason.ARCHIVE_FORBIDDEN,
                "the archive is larger than this server takes",
                field="data",
                limit=self._max_bytes,
            )
        try:
            await asyncio.to_thread(self._write, data)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise errors.storage_full() from error
            raise

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)

    def finish(self) -> bytes:
        """Closes the file; returns the SHA-256 of all of it. Again is no error."""
        self._file.close()
        return self._hash.digest()
