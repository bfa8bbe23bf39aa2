"""Searches for planted texts: in every file of a data folder, and in the memory of processes.

What is searched for is a canary: a text that stands nowhere but in what was deleted. It is looked
for in each form in which it could rest: UTF-8, the forms in which Python keeps strings,
and JSON's escapes. Linux alone shows processes' memory, and only to who may debug them.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE_BYTES = 16 * 2**20
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (r\S+) \S+ \S+ \d+\s*(.*)")
_SHARED = "/dev/shm/"  # noqa: S108 - to look into, not to put anything there
#: Mapped by the kernel itself; not readable, or the same everywhere.
_SPECIAL = ("[vvar]", "[vsyscall]", "[vvar_vclock]")


@dataclass(frozen=True)
class Hit:
    """A canary that was found. canary: its place in the list searched for; where: a file, or
    a process and the part of its memory; offset: in that, in bytes.
    """

    canary: int
    where: str
    offset: int


@dataclass
class Searched:
    """How much was looked at. unreadable: what could not be, which is no all-clear."""

    files: int = 0
    processes: int = 0
    bytes: int = 0
    unreadable: list[str] | None = None

    def missed(self, what: str) -> None:
        """Notes something that could not be read."""
        self.unreadable = [*(self.unreadable or ()), what]


class Search:
    """Looks for canaries; what it has seen is in `searched`."""

    def __init__(self, canaries: Sequence[str]) -> None:
        self.searched = Searched()
        self._forms = [(index, form) for index, text in enumerate(canaries) for form in forms(text)]
        if not self._forms:
            raise ValueError("there is no canary to search for")
        self._overlap = max(len(form) for _, form in self._forms) - 1

    def folder(self, root: Path) -> Iterator[Hit]:
        """Every file below a folder, whatever it is."""
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield from self.file(path)

    def file(self, path: Path) -> Iterator[Hit]:
        """One file, its holes included. Sockets and the like hold nothing."""
        try:
            with path.open("rb", buffering=0) as file:
                self.searched.files += 1
                yield from self._pieces(file.fileno(), 0, None, str(path))
        except FileNotFoundError:
            return  # Gone meanwhile: a log that was turned, a staged file.
        except OSError as error:
            self.searched.missed(f"{path}: {error.strerror}")

    def process(self, pid: int) -> Iterator[Hit]:
        """All readable memory of a process, but for what it maps of files unchanged."""
        try:
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                self.searched.processes += 1
                for line in maps:
                    found = _MAP.match(line)
                    if found is None or _is_elsewhere(found[3], found[4]):
                        continue
                    start, end = int(found[1], 16), int(found[2], 16)
                    where = f"process {pid} {found[4] or 'anonymous'}"
                    yield from self._pieces(memory.fileno(), start, end, where)
        except OSError as error:
            self.searched.missed(f"process {pid}: {error.strerror}")

    def _pieces(self, handle: int, start: int, end: int | None, where: str) -> Iterator[Hit]:
        """Piece by piece, each with the end of the one before it."""
        kept, place = b"", start
        while end is None or place < end:
            wanted = _PIECE_BYTES if end is None else min(_PIECE_BYTES, end - place)
            try:
                piece = os.pread(handle, wanted, place)
            except OSError:
                # A page that was unmapped or cannot be read: the rest may be.
                if end is None:
                    raise
                kept, place = b"", place + mmap.PAGESIZE * -(-min(wanted, 2**20) // mmap.PAGESIZE)
                continue
            if not piece:
                return
            data = kept + piece
            for index, form in self._forms:
                found = data.find(form)
                while found >= 0:
                    if found + len(form) > len(kept):  # Else it was told with the last piece.
                        yield Hit(index, where, place - len(kept) + found)
                    found = data.find(form, found + 1)
            self.searched.bytes += len(piece)
            place += len(piece)
            kept = data[-self._overlap :] if self._overlap else b""


def _is_elsewhere(rights: str, name: str) -> bool:
    """Parts that the kernel maps, devices, and files mapped unchanged: those are files."""
    if name.endswith(" (deleted)"):
        return False  # The file was removed, and lives on in the map alone; or never had a name.
    device = name.startswith("/dev/") and not name.startswith(_SHARED)
    unchanged = name.startswith("/") and "w" not in rights
    return name in _SPECIAL or device or unchanged


def forms(canary: str) -> list[bytes]:
    """The bytes to look for, without repetitions."""
    if len(canary.encode()) < 8:
        raise ValueError("a canary has at least 8 bytes: a shorter one is found by chance")
    escaped = json.dumps(canary)[1:-1]
    found = [
        canary.encode(),
        canary.encode("utf-16-le"),
        canary.encode("utf-32-le"),
        escaped.encode(),
    ]
    return list(dict.fromkeys(found))


def processes_of(root: Path, lock: Path) -> list[int]:
    """The server that holds a data folder, what it started, and who maps files of the folder."""
    try:
        holders = _holders(lock)
    except OSError:
        holders = set()
    folder = f"{root.resolve()}/"
    found = set(holders)
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            status = (entry / "stat").read_text()
            parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
            if folder in (entry / "maps").read_text():
                found.add(int(entry.name))
        except OSError:
            continue  # It ended, or is somebody else's.
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found & parents.keys())


def _holders(lock: Path) -> set[int]:
    """Processes that hold a flock on a file."""
    inode = lock.stat().st_ino
    holders: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "FLOCK" in words and words[-3].rpartition(":")[2] == str(inode):
            holders.add(int(words[4]))
    return holders
