"""Reads an archive from a file: verifies all of it, then gives out its contents.

Nothing of the archive is trusted: sizes are checked against limits before they are
allocated, hashes before contents are parsed, contents against the manifest.
Memory stays at a few members' size, plus 8 bytes a document.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from storage.archive.bounds import MAX_TIME_US, MIN_TIME_US
from storage.archive.errors import (
    ArchiveCorruptError,
    ArchiveForbiddenError,
    ArchiveLimits,
    ArchiveSignatureError,
    ArchiveTruncatedError,
)
from storage.archive.history import ArchivedRevision, HistoryCheck, decode_line
from storage.archive.manifest import ArchivedEncoding, Manifest, decode_manifest
from storage.archive.members import (
    INDEX,
    MANIFEST,
    SIGNATURE,
    Member,
    Source,
    check_order,
    next_member,
    read_exactly,
    read_tail,
    skip_member,
)
from storage.archive.signature import Signature, verify_signature
from storage.archive.tensors import decode_blocks
from storage.codecs import CodecError, decompress, frame_bytes
from storage.document_json import DocumentFormatError, Fields, decode_document, load_json
from storage.layout import KVBlock
from storage.store import EncodingId, StoredDocument


class Archive:
    """A verified archive. Made by `open_archive`; a context manager that closes the file.

    manifest: what it holds. signature: None for an archive that is not signed; that it is
    signed says nothing before `check_signer`. Iterating reads the file again, and checks
    hashes again.
    """

    def __init__(self, file: Source, limits: ArchiveLimits) -> None:
        self._file = file
        self._limits = limits
        self._verified = False
        self.manifest, self._members, self.signature = _scan(file, limits)
        self._verify()
        self._verified = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Again is no error."""
        self._file.close()

    @property
    def members(self) -> Sequence[Member]:
        """All but the index and the signature, in their order, with their verified hashes."""
        return tuple(self._members)

    def check_signer(self, public_key: str) -> None:
        """Raises ArchiveSignatureError unless this key (64 hex digits) signed the archive."""
        if self.signature is None:
            raise ArchiveSignatureError("the archive is not signed")
        if self.signature.public_key != public_key.lower():
            raise ArchiveSignatureError("the archive is signed by another key")

    def revisions(self) -> Iterator[ArchivedRevision]:
        """What the memory's writes made, ascending. Raises as `documents`."""
        return (decode_line(name, line) for name, line in self._lines("revisions/"))

    def documents(self) -> Iterator[StoredDocument]:
        """Documents, ascending by number. Raises ArchiveError if the file changed meanwhile."""
        last = 0
        for name, line in self._lines("documents/"):
            try:
                document = decode_document(line)
            except DocumentFormatError as error:
                raise ArchiveCorruptError(f"{name}: {error}") from error
            if document.number <= last:
                raise ArchiveCorruptError(f"document {document.number} is out of order")
            if not MIN_TIME_US <= document.created_at_us <= MAX_TIME_US:
                raise ArchiveCorruptError(f"document {document.number} is of no time")
            last = document.number
            yield document

    def _lines(self, folder: str) -> Iterator[tuple[str, bytes]]:
        total = 0
        for member in self._under(folder):
            text = self._text(member, self._limits.total_text_bytes - total)
            total += len(text)
            for line in _split_lines(member.name, text):
                yield member.name, line

    def blocks(self, encoding: EncodingId) -> Iterator[KVBlock]:
        """Blocks of one of the manifest's encodings, ascending by number.

        Raises KeyError for an encoding that the manifest does not name, else as `documents`.
        """
        found = {one.encoding_id: one for one in self.manifest.encodings}[encoding]
        return self._blocks(found)

    def _blocks(self, encoding: ArchivedEncoding) -> Iterator[KVBlock]:
        last = 0
        for member in self._under(f"encodings/{encoding.encoding_id.hex()}/"):
            for block in decode_blocks(encoding.layout, self._read(member)):
                if block.number <= last:
                    raise ArchiveCorruptError(f"block {block.number} is out of order")
                last = block.number
                yield block

    def _under(self, folder: str) -> list[Member]:
        return [member for member in self._members if member.name.startswith(folder)]

    def _read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        data = read_exactly(self._file, member.size, member.name)
        # While it is verified nothing is given out, and the hash was taken a moment ago.
        if self._verified and hashlib.sha256(data).hexdigest() != member.sha256:
            raise ArchiveCorruptError(f"{member.name} changed while it was read")
        return data

    def _text(self, member: Member, left: int) -> bytes:
        data = self._read(member)
        try:
            size = frame_bytes(data)
            if size > min(self._limits.text_bytes, left):
                raise ArchiveForbiddenError(f"{member.name} would expand to {size} bytes")
            return decompress(data, size)
        except CodecError as error:
            raise ArchiveCorruptError(f"{member.name}: {error}") from error

    def _verify(self) -> None:
        manifest = self.manifest
        numbers = array("q")
        history = HistoryCheck(manifest.revision, manifest.last_number)
        for revision in self.revisions():
            history.take_revision(revision)
        if history.revisions != (manifest.revisions or 0):
            raise ArchiveCorruptError(
                f"{history.revisions} revisions, the manifest says {manifest.revisions}"
            )
        for document in self.documents():
            history.take_document(document.number, document.revision)
            numbers.append(document.number)
        if len(numbers) != manifest.documents:
            raise ArchiveCorruptError(
                f"{len(numbers)} documents, the manifest says {manifest.documents}"
            )
        known = np.frombuffer(numbers, np.int64) if numbers else np.empty(0, np.int64)
        for encoding in manifest.encodings:
            held = array("q", (block.number for block in self._blocks(encoding)))
            if len(held) != encoding.blocks:
                raise ArchiveCorruptError(
                    f"{len(held)} blocks, the manifest says {encoding.blocks}"
                )
            if not np.isin(np.array(held, np.int64), known, assume_unique=True).all():
                raise ArchiveCorruptError("a block has no document")


def open_archive(source: Path | Source, limits: ArchiveLimits | None = None) -> Archive:
    """Opens and verifies an archive: hashes, structure, every document and block.

    source: a file's path, or what reads and seeks as a file opened for reading does; closed
    with the archive, and when this raises.

    Raises ArchiveTruncatedError, ArchiveCorruptError, ArchiveVersionError,
    ArchiveForbiddenError; OSError when the file cannot be read.
    """
    file = source.open("rb") if isinstance(source, Path) else source
    try:
        return Archive(file, limits or ArchiveLimits())
    except BaseException:
        file.close()
        raise


def _scan(file: Source, limits: ArchiveLimits) -> tuple[Manifest, list[Member], Signature | None]:
    """Manifest and members, whose hashes are those of the index, and who signed that."""
    manifest = _read_manifest(file, limits)
    members: list[Member] = []
    seen: set[str] = set()
    file.seek(0)
    while found := next_member(file, limits):
        name, size = found
        if name in seen:
            raise ArchiveForbiddenError(f"{name} comes twice")
        if len(members) == limits.members:
            raise ArchiveForbiddenError(f"more than {limits.members} members")
        seen.add(name)
        members.append(skip_member(file, name, size))
    read_tail(file)
    signature = members.pop() if members[-1].name == SIGNATURE and len(members) > 1 else None
    if members[-1].name != INDEX:
        raise ArchiveTruncatedError("the archive ends without its index")
    check_order(members, manifest)
    index = members.pop()
    file.seek(index.offset)
    listed = read_exactly(file, index.size, INDEX)
    if _parse_index(listed) != [(member.name, member.size, member.sha256) for member in members]:
        raise ArchiveCorruptError("a member's hash is not the one in the index")
    if signature is None:
        return manifest, members, None
    file.seek(signature.offset)
    signed = read_exactly(file, signature.size, SIGNATURE)
    return manifest, members, verify_signature(signed, listed)


def _read_manifest(file: Source, limits: ArchiveLimits) -> Manifest:
    """Read before all else, so that a newer version is told from a damaged file."""
    found = next_member(file, limits)
    if found is None or found[0] != MANIFEST:
        raise ArchiveCorruptError("the archive does not begin with its manifest")
    return decode_manifest(read_exactly(file, found[1], MANIFEST))


def _parse_index(data: bytes) -> list[tuple[str, int, str]]:
    def parse(value: object) -> tuple[str, int, str]:
        member = Fields(value, "member")
        entry = member.text("name"), member.integer("size", 0, 2**62), member.text("sha256")
        member.close()
        return entry

    try:
        fields = Fields(load_json(data), "index")
        members = fields.items("members", parse)
        fields.close()
    except DocumentFormatError as error:
        raise ArchiveCorruptError(f"{INDEX}: {error}") from error
    return list(members)


def _split_lines(name: str, text: bytes) -> Iterator[bytes]:
    if not text.endswith(b"\n"):
        raise ArchiveCorruptError(f"{name} does not end with a line")
    start = 0
    while start < len(text):
        end = text.index(b"\n", start)
        yield text[start:end]
        start = end + 1
