"""Members of an archive: a plain ustar file, read with no more trust than it needs.

The parser knows regular files with names of this format, in the order of this
format, and nothing else: no links, devices, folders, extended headers, sparse
files or long names. Names are compared, never used as paths.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from storage.archive.errors import (
    ArchiveCorruptError,
    ArchiveForbiddenError,
    ArchiveLimits,
    ArchiveTruncatedError,
)
from storage.archive.manifest import Manifest

RECORD = 512
MANIFEST = "manifest.json"
INDEX = "index.json"
SIGNATURE = "signature.json"
#: Two empty records end a tar; tools may fill up to this with more.
_MAX_TAIL = 20 * RECORD
_PIECE = 2**20
_KNOWN = re.compile(
    r"manifest\.json|index\.json|signature\.json|(revisions|documents)/\d{6}\.jsonl\.zst"
    r"|encodings/[0-9a-f]{32}/\d{6}\.safetensors"
)
_EMPTY = bytes(RECORD)


def revisions_name(index: int) -> str:
    """Name of the revisions member with that index, from 0."""
    return f"revisions/{index:06d}.jsonl.zst"


def documents_name(index: int) -> str:
    """Name of the documents member with that index, from 0."""
    return f"documents/{index:06d}.jsonl.zst"


def blocks_name(encoding: bytes, index: int) -> str:
    """Name of an encoding's blocks member with that index, from 0."""
    return f"encodings/{encoding.hex()}/{index:06d}.safetensors"


class Source(Protocol):
    """What an archive is read from: as a file that is opened for reading bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Fewer bytes than `size` at the end only."""
        ...

    def seek(self, offset: int, /) -> int:
        """From the start."""
        ...

    def tell(self) -> int:
        """Where the next read begins."""
        ...

    def close(self) -> None:
        """Again is no error."""
        ...


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the file, and their SHA-256 in hex."""

    name: str
    offset: int
    size: int
    sha256: str


def member_parts(name: str, data: bytes) -> Iterator[bytes]:
    """Header, bytes and padding of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o600
    yield info.tobuf(tarfile.USTAR_FORMAT)
    yield data
    yield bytes(-len(data) % RECORD)


def end_parts() -> Iterator[bytes]:
    """The end of a tar."""
    yield _EMPTY * 2


def read_exactly(file: Source, size: int, what: str) -> bytes:
    """Raises ArchiveTruncatedError when the file ends before."""
    data = file.read(size)
    if len(data) != size:
        raise ArchiveTruncatedError(f"the archive ends within {what}")
    return data


def next_member(file: Source, limits: ArchiveLimits) -> tuple[str, int] | None:
    """Name and size of the member whose header comes next; None at the archive's end."""
    header = read_exactly(file, RECORD, "a member's header")
    if header == _EMPTY:
        return None
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ArchiveCorruptError(f"no member begins at {file.tell() - RECORD}: {error}") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.linkname:
        raise ArchiveForbiddenError(f"{info.name[:80]!r} is not a plain file")
    if not _KNOWN.fullmatch(info.name):
        raise ArchiveForbiddenError(f"{info.name[:80]!r} is no member of an archive")
    if not 0 <= info.size <= _size_limit(info.name, limits):
        raise ArchiveForbiddenError(f"{info.name} is too large: {info.size} bytes")
    return info.name, info.size


def _size_limit(name: str, limits: ArchiveLimits) -> int:
    if name in (MANIFEST, SIGNATURE):
        return limits.manifest_bytes
    return limits.index_bytes if name == INDEX else limits.member_bytes


def skip_member(file: Source, name: str, size: int) -> Member:
    """Reads over a member and its padding in pieces, taking the hash."""
    offset = file.tell()
    digest = hashlib.sha256()
    left = size
    while left:
        piece = read_exactly(file, min(left, _PIECE), name)
        digest.update(piece)
        left -= len(piece)
    if any(read_exactly(file, -size % RECORD, name)):
        raise ArchiveCorruptError(f"{name} is followed by bytes that belong to nothing")
    return Member(name, offset, size, digest.hexdigest())


def read_tail(file: Source) -> None:
    """Reads what follows the first empty record. Raises unless it ends the file."""
    tail = file.read(_MAX_TAIL + 1)
    if len(tail) < RECORD:
        raise ArchiveTruncatedError("the archive ends within its last record")
    if any(tail) or len(tail) > _MAX_TAIL:
        raise ArchiveCorruptError("something follows the end of the archive")


def check_order(members: list[Member], manifest: Manifest) -> None:
    """Raises unless the members up to the index are those of the manifest, each once, in order,
    without gaps.
    """
    names = [member.name for member in members]
    folders = [f"encodings/{encoding.encoding_id.hex()}/" for encoding in manifest.encodings]
    lines = ["documents/"] if manifest.revisions is None else ["revisions/", "documents/"]
    known = (*lines, *folders)
    for name in names[1:-1]:
        if not name.startswith(known):
            raise ArchiveForbiddenError(f"{name} is of nothing that the manifest names")
    expected = [MANIFEST]
    for folder in known:
        ending = ".jsonl.zst" if folder in lines else ".safetensors"
        count = sum(name.startswith(folder) for name in names)
        expected += [f"{folder}{index:06d}{ending}" for index in range(count)]
    if names != [*expected, INDEX]:
        raise ArchiveCorruptError("members are missing or out of order")
