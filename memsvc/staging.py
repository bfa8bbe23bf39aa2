"""Staging files: archives on their way in or out.

A staging file has a random name and lies encrypted under a key that is in this process's memory
alone, so that forgetting the key is enough to destroy it. It is gone when its with block ends,
unless it was to be kept: what a cut call leaves waits a while for the call that goes on with
it. What a killed process leaves behind is overwritten and removed when the data folder is taken
hold of again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.config import MIB
from memsvc.limits import FairPool
from memsvc.v1.errors_pb2 import ErrorReason
from storage.crypto.root_keys import overwrite
from storage.paths import DataFolder

#: Most bytes of one archive that are taken in.
MAX_ARCHIVE_BYTES = 64 * 1024 * MIB
#: Archives on their way at once, in and out; a tenant alone gets half of it.
MAX_AT_ONCE = 4
#: Files that wait for their call to go on, of all tenants and of one.
MAX_KEPT, MAX_KEPT_OF_TENANT = 8, 2
_SHARE = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 16


class StagingKey:
    """Encrypts one staged file: AES-256-CTR under a random key that is used once and never kept.

    A stream cipher without a tag is enough: an archive proves by itself that it is whole.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def _stream(self, block: int) -> Cipher[modes.CTR]:
        return Cipher(algorithms.AES256(self._key), modes.CTR(block.to_bytes(_BLOCK, "big")))

    def encrypted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces as they are to lie in the file. Each call takes another key."""
        self._key = secrets.token_bytes(32)
        return map(self._stream(0).encryptor().update, pieces)

    def opener(self, offset: int = 0) -> Callable[[bytes], bytes]:
        """Turns the file's bytes into what they were, or back, piece by piece from offset on."""
        block, within = divmod(offset, _BLOCK)
        update = self._stream(block).decryptor().update
        update(bytes(within))
        return update


class Staged:
    """One staging file. keep_as: kept under this name when its block ends; empty: not kept.

    memory_uid: whose archive goes out; empty for one that comes in. fresh: made by this
    call. size: bytes of the archive that are in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = StagingKey()
        self.memory_uid = ""
        self.keep_as = ""
        self.fresh = True
        self.size = 0
        self.hash = hashlib.sha256()
        #: What it was made for; a call that goes on with it must be for the same.
        self.purpose = ""
        self.forgotten = False


class Opened:
    """A staged file's content, for reading. Made for `storage.archive.open_archive`."""

    def __init__(self, staged: Staged) -> None:
        self._file = staged.path.open("rb")
        self._key = staged.key
        self._at = 0
        self._open = staged.key.opener()

    def read(self, size: int = -1, /) -> bytes:
        """As of a file."""
        data = self._open(self._file.read(size))
        self._at += len(data)
        return data

    def seek(self, offset: int, /) -> int:
        """From the start."""
        if offset != self._at:
            self._file.seek(offset)
            self._at, self._open = offset, self._key.opener(offset)
        return offset

    def tell(self) -> int:
        """As of a file."""
        return self._at

    def close(self) -> None:
        """Again is no error."""
        self._file.close()


class Staging:
    """The staging folder of one server, and how much of it may be used at once.

    keep_s: how long a file waits for its call to go on; 0: not at all.
    """

    def __init__(self, data: DataFolder, keep_s: float = 0.0, at_once: int = MAX_AT_ONCE) -> None:
        self._folder = data.staging
        self._keep_s = keep_s
        self._places = FairPool(at_once, _SHARE)
        self._active: dict[Staged, tuple[str, str]] = {}
        self._kept: dict[tuple[str, str], tuple[Staged, asyncio.TimerHandle]] = {}
        self._going: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> Collection[Staged]:
        """Files that a call is at now."""
        return self._active.keys()

    def require_room(self, tenant_uid: str) -> None:
        """Raises OVERLOADED when `file` would have no place for one more of the tenant's."""
        self._places.require_room(tenant_uid)

    @asynccontextmanager
    async def file(self, tenant_uid: str, name: str = "") -> AsyncIterator[Staged]:
        """The file that was kept under this name, or one that is not there yet.

        Raises OVERLOADED, also while another call is at the file of that name.
        """
        place = tenant_uid, name
        if name and place in self._active.values():
            raise errors.overloaded()
        self._places.take(tenant_uid)
        staged = self._take(place) or Staged(self._folder / f"{secrets.token_hex(16)}.msamem")
        self._active[staged] = place
        try:
            yield staged
        finally:
            del self._active[staged]
            self._places.give(tenant_uid)
            if not self._keep(tenant_uid, staged):
                await asyncio.shield(asyncio.to_thread(_remove, staged.path))

    def drop(self, tenant_uid: str, name: str) -> None:
        """Forgets the file that is kept under this name, if there is one."""
        staged = self._take((tenant_uid, name))
        if staged is not None:
            self._remove_later(staged)

    def forget(self, tenant_uid: str, memory_uid: str) -> None:
        """Something of the memory is being deleted, or with an empty uid all of the tenant: no
        archive of it is kept, not even of those that are going out now.
        """
        for staged, (tenant, _) in self._active.items():
            if tenant == tenant_uid and memory_uid in ("", staged.memory_uid):
                staged.forgotten = True
        for (tenant, name), (staged, _) in list(self._kept.items()):
            if tenant == tenant_uid and memory_uid in ("", staged.memory_uid):
                self.drop(tenant, name)

    def _take(self, place: tuple[str, str]) -> Staged | None:
        kept = self._kept.pop(place, None)
        if kept is None:
            return None
        staged, timer = kept
        timer.cancel()
        staged.fresh, staged.keep_as = False, ""
        return staged

    def _keep(self, tenant_uid: str, staged: Staged) -> bool:
        if not (staged.keep_as and staged.size and self._keep_s) or staged.forgotten:
            return False
        self.drop(tenant_uid, staged.keep_as)
        mine = [name for tenant, name in self._kept if tenant == tenant_uid]
        if len(mine) >= MAX_KEPT_OF_TENANT:
            self.drop(tenant_uid, mine[0])
        if len(self._kept) >= MAX_KEPT:
            return False
        name = staged.keep_as
        timer = asyncio.get_running_loop().call_later(self._keep_s, self.drop, tenant_uid, name)
        self._kept[tenant_uid, name] = staged, timer
        return True

    def _remove_later(self, staged: Staged) -> None:
        # Whoever has it opened keeps a key of its own; the file's is gone with `staged`.
        task = asyncio.ensure_future(asyncio.to_thread(_remove, staged.path))
        self._going.add(task)
        task.add_done_callback(self._going.discard)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def destroy(path: Path) -> None:
    """Overwrites and removes a file whose key may still be about; none there is no error."""
    with suppress(FileNotFoundError):
        overwrite(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        path.unlink()


class Incoming:
    """An archive being received into a staged file, behind what is there. Bounded by max_bytes."""

    def __init__(self, staged: Staged, max_bytes: int = MAX_ARCHIVE_BYTES) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC
        flags |= os.O_CREAT | os.O_EXCL if staged.fresh else os.O_APPEND
        self._file: BinaryIO = os.fdopen(os.open(staged.path, flags, 0o600), "wb")
        self._staged = staged
        self._encrypted = staged.key.opener(staged.size)
        self._max_bytes = max_bytes

    async def write(self, data: bytes) -> None:
        """Adds a piece. Raises ARCHIVE_FORBIDDEN past the limit, STORAGE_FULL."""
        if self._staged.size + len(data) > self._max_bytes:
            raise ApiError(
                ErrorReason.ARCHIVE_FORBIDDEN,
                "the archive is larger than this server takes",
                field="data",
                limit=self._max_bytes,
            )
        try:
            writing = asyncio.ensure_future(asyncio.to_thread(self._write, data))
            try:
                await asyncio.shield(writing)
            finally:
                # A caller who leaves does not stop the thread: what it writes must count.
                await asyncio.wait([writing])
        except OSError as error:
            self._staged.forgotten = True
            if error.errno in _NO_ROOM:
                raise errors.storage_full() from error
            raise

    def _write(self, data: bytes) -> None:
        self._staged.hash.update(data)
        self._file.write(self._encrypted(data))
        self._staged.size += len(data)

    def finish(self) -> None:
        """Closes the file. Again is no error."""
        self._file.close()
