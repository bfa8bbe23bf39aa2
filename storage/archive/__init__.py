"""The .msamem archive, version 1: one memory in one file that others can read too.

A plain tar: manifest.json, documents as zstd-compressed JSON lines, blocks as
safetensors per encoding, index.json with every member's SHA-256. The format is
drawn in docs/format/archive.md.

Export. `export_memory(store, memory, manifest, numbers)` yields the bytes. To tell
the size beforehand, stage it:

    manifest = Manifest(created_at_us=now, display_name=..., packing=ArchivedPacking(...),
                        revision=row.revision, last_number=row.last_number,
                        labels=row.labels, encodings=(ArchivedEncoding(...), ...))
    total = stage_archive(path, export_memory(store, memory, manifest, live_numbers))
    for piece in staged_pieces(path): ...

Import. Stage the stream into a file, with a limit on its bytes, then:

    with open_archive(path) as archive:      # verifies everything, or raises ArchiveError
        archive.manifest
        for document in archive.documents(): ...
        for block in archive.blocks(encoding.encoding_id): ...

All calls block; an event loop runs them in a thread.
"""

from storage.archive.errors import (
    ArchiveCorruptError,
    ArchiveError,
    ArchiveForbiddenError,
    ArchiveLimits,
    ArchiveSignatureError,
    ArchiveSourceError,
    ArchiveTruncatedError,
    ArchiveVersionError,
)
from storage.archive.history import ArchivedRevision
from storage.archive.manifest import ArchivedEncoding, ArchivedPacking, Manifest
from storage.archive.read import Archive, open_archive
from storage.archive.signature import Signature, Signer
from storage.archive.write import export_memory, stage_archive, staged_pieces, write_archive

__all__ = [
    "Archive",
    "ArchiveCorruptError",
    "ArchiveError",
    "ArchiveForbiddenError",
    "ArchiveLimits",
    "ArchiveSignatureError",
    "ArchiveSourceError",
    "ArchiveTruncatedError",
    "ArchiveVersionError",
    "ArchivedEncoding",
    "ArchivedPacking",
    "ArchivedRevision",
    "Manifest",
    "Signature",
    "Signer",
    "export_memory",
    "open_archive",
    "stage_archive",
    "staged_pieces",
    "write_archive",
]
