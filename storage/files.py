"""Files that are on the disk, not only in its cache, when a call returns."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from storage.store import StorageError, StorageFullError, StoreUnavailableError

#: Error numbers of a disk that has no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(error: Exception, what: str = "") -> StorageError:
    """What a failed call of the system is to callers of a store. what: failed, for operators."""
    text = f"{what}: {error}" if what else str(error)
    if any(os.strerror(code) in str(error) for code in FULL):
        return StorageFullError(f"disk is full: {text}")
    return StoreUnavailableError(text)


def sync_folder(folder: Path) -> None:
    """Makes names that were added to a folder, or removed from it, durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Makes a file's bytes durable. Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_new(path: Path, data: bytes) -> None:
    """A new file that its owner alone may read (0600). Its bytes are durable on return, its
    name is once its folder is synced. Raises FileExistsError, OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)
