"""What is wrong with an archive, and how much of one is accepted.

StorageError
├─ ArchiveError               the file cannot be imported
│  ├─ ArchiveTruncatedError   it ends too early
│  ├─ ArchiveCorruptError     its bytes are not what its checksums or its format say
│  ├─ ArchiveVersionError     it is of a version that this program does not know
│  ├─ ArchiveSignatureError   its signature is not good, or not whose it must be
│  └─ ArchiveForbiddenError   it holds what no archive may, or more than is accepted
└─ ArchiveSourceError         an export's source changed, or cannot be exported
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.store import StorageError

_MIB = 2**20


class ArchiveError(StorageError):
    """Root of what reading an archive raises."""


class ArchiveTruncatedError(ArchiveError):
    """The file ends before the archive does."""


class ArchiveCorruptError(ArchiveError):
    """Bytes that do not match their checksum, or contents that contradict each other."""


class ArchiveVersionError(ArchiveError):
    """Made by a newer program. version: what the manifest says."""

    def __init__(self, version: int) -> None:
        super().__init__(f"archive of version {version}; this program reads version 1")
        self.version = version


class ArchiveSignatureError(ArchiveError):
    """A signature that does not verify, or an archive that is not signed as was asked."""


class ArchiveForbiddenError(ArchiveError):
    """A member that archives don't have, or sizes over the limits."""


class ArchiveSourceError(StorageError):
    """What was to be exported changed meanwhile, or does not fit an archive."""


@dataclass(frozen=True)
class ArchiveLimits:
    """What a reader accepts. Each is checked before anything of that size is allocated.

    member_bytes: one member as stored. text_bytes: one documents member, decompressed;
    parsed JSON can take twenty times that for a moment. total_text_bytes: all of them.
    members: how many.
    """

    manifest_bytes: int = 1 * _MIB
    index_bytes: int = 8 * _MIB
    member_bytes: int = 128 * _MIB
    text_bytes: int = 16 * _MIB
    total_text_bytes: int = 16 * 1024 * _MIB
    members: int = 50_000
