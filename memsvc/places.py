"""A server's own place, where several servers share a data folder on one host.

A server has a folder of its own, `servers/<uid>`, with a lock that it holds for as long as its
process lives: the kernel frees it at whatever end, and never sooner, so not while the process
is only stopped. Whoever gets the lock of another server knows that it has ended, with every
file it had open, and may put away what it left.

`place` names host (this boot of it) and data folder. Locks are asked between servers of one
place alone: of any other the lock says nothing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memsvc.staging import destroy
from storage.paths import DataFolder

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LOCK = "lock"
_UID_BYTES = 8


@dataclass(frozen=True)
class Place:
    """uid: of this server process, never used twice. data: the data folder as it sees it."""

    uid: str
    name: str
    data: DataFolder


@contextmanager
def take_place(root: Path) -> Iterator[Place]:
    """A fresh place in the data folder, until the with block ends."""
    uid = secrets.token_hex(_UID_BYTES)
    folder = DataFolder(root).server(uid)
    folder.mkdir(mode=0o700, parents=True)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Place(uid, place_name(root), DataFolder(root, own=folder))
    finally:
        _clear(folder)
        os.close(lock)


def place_name(root: Path) -> str:
    """Names a data folder of a host, whatever path and container it is seen by."""
    try:
        host = _BOOT_ID.read_text().strip()
    except OSError:
        host = platform.node()
    found = root.stat()
    return f"{host} {found.st_dev}:{found.st_ino}"


def bury(root: Path, uid: str) -> bool:
    """Whether the process of that server has ended; then nothing is left of its folder."""
    folder = DataFolder(root).server(uid)
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _clear(folder: Path) -> None:
    for path in (folder / "staging").glob("*.msamem"):
        destroy(path)
    shutil.rmtree(folder, ignore_errors=True)
