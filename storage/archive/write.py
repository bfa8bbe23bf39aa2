"""Writes an archive as a stream of pieces, one member in memory at a time."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from storage.archive.errors import ArchiveLimits, ArchiveSourceError
from storage.archive.history import ArchivedRevision, encode_revision
from storage.archive.manifest import ArchivedEncoding, Manifest, encode_manifest
from storage.archive.members import (
    INDEX,
    MANIFEST,
    SIGNATURE,
    blocks_name,
    documents_name,
    end_parts,
    member_parts,
    revisions_name,
)
from storage.archive.signature import Signer, encode_signature
from storage.archive.tensors import encode_blocks
from storage.codecs import compress
from storage.document_json import dump_json, encode_document
from storage.layout import KVBlock, KVLayout
from storage.store import (
    BlockReader,
    EncodingId,
    MemoryUid,
    StorageError,
    StorageFullError,
    StoredDocument,
)

Item = TypeVar("Item")

#: A member is closed at this size; only a single larger item makes a larger one.
_TEXT_BYTES = 4 * 2**20
_BLOCK_BYTES = 8 * 2**20
_READ_BYTES = 2**20


@dataclass(frozen=True)
class _Listed:
    name: str
    size: int
    sha256: str


class _Writer:
    """Makes members and remembers them for the index."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._listed: list[_Listed] = []

    def member(self, name: str, data: bytes) -> Iterator[bytes]:
        """The parts of one member. Raises ArchiveSourceError for one that no reader accepts."""
        if len(data) > self._limits.member_bytes:
            raise ArchiveSourceError(f"{name} would hold {len(data)} bytes")
        self._listed.append(_Listed(name, len(data), hashlib.sha256(data).hexdigest()))
        return member_parts(name, data)

    def index(self, signer: Signer | None) -> Iterator[bytes]:
        """Every member's size and hash, a signature of that, and the end."""
        members = [
            {"name": one.name, "sha256": one.sha256, "size": one.size} for one in self._listed
        ]
        index = dump_json({"members": members})
        yield from member_parts(INDEX, index)
        if signer is not None:
            yield from member_parts(SIGNATURE, encode_signature(signer, index))
        yield from end_parts()


def write_archive(
    manifest: Manifest,
    documents: Iterable[StoredDocument],
    blocks: Mapping[EncodingId, Iterable[KVBlock]],
    limits: ArchiveLimits | None = None,
    *,
    revisions: Iterable[ArchivedRevision] = (),
    signer: Signer | None = None,
) -> Iterator[bytes]:
    """The archive's bytes in order, in pieces of very different sizes.

    revisions, documents and each of `blocks` ascend by number, as many as the manifest says;
    blocks has an entry for each of its encodings. Raises ArchiveSourceError when they
    do not: what was given out by then is no archive.
    """
    return _write(
        manifest,
        map(encode_document, documents),
        blocks,
        limits or ArchiveLimits(),
        revisions=map(encode_revision, revisions),
        signer=signer,
    )


def _write(
    manifest: Manifest,
    documents: Iterable[bytes],
    blocks: Mapping[EncodingId, Iterable[KVBlock]],
    limits: ArchiveLimits,
    *,
    revisions: Iterable[bytes],
    signer: Signer | None,
) -> Iterator[bytes]:
    """See write_archive. Documents and revisions as JSON."""
    writer = _Writer(limits)
    yield from writer.member(MANIFEST, encode_manifest(manifest))
    texts = (
        ("revisions", revisions_name, manifest.revisions or 0, revisions),
        ("documents", documents_name, manifest.documents, documents),
    )
    for what, name_of, expected, lines in texts:
        count = 0
        for index, (text, number) in enumerate(_runs(what, lines, limits)):
            yield from writer.member(name_of(index), compress(text))
            count += number
        _expect(what, expected, count)
    for encoding in manifest.encodings:
        count = 0
        runs = _block_runs(encoding.layout, blocks[encoding.encoding_id])
        for index, run in enumerate(runs):
            name = blocks_name(encoding.encoding_id, index)
            yield from writer.member(name, encode_blocks(encoding.layout, run))
            count += len(run)
        _expect(f"blocks of {encoding.model_id}", encoding.blocks, count)
    yield from writer.index(signer)


def _expect(what: str, expected: int, found: int) -> None:
    if found != expected:
        raise ArchiveSourceError(f"{found} {what} were found, {expected} were there at first")


def _runs(what: str, texts: Iterable[bytes], limits: ArchiveLimits) -> Iterator[tuple[bytes, int]]:
    """Lines of about a member each, and how many they are."""
    lines: list[bytes] = []
    size = 0
    for text in texts:
        line = text + b"\n"
        if len(line) > limits.text_bytes:
            raise ArchiveSourceError(f"one of the {what} has {len(line)} bytes")
        if lines and size + len(line) > _TEXT_BYTES:
            yield b"".join(lines), len(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield b"".join(lines), len(lines)


def _block_runs(layout: KVLayout, blocks: Iterable[KVBlock]) -> Iterator[list[KVBlock]]:
    run: list[KVBlock] = []
    size = 0
    for block in blocks:
        own = layout.block_bytes(block.tokens)
        if run and size + own > _BLOCK_BYTES:
            yield run
            run, size = [], 0
        run.append(block)
        size += own
    if run:
        yield run


def export_memory(
    store: BlockReader,
    memory: MemoryUid,
    manifest: Manifest,
    numbers: Sequence[int],
    revisions: Sequence[ArchivedRevision] | None = None,
    *,
    signer: Signer | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[bytes]:
    """An archive of the memory's documents with these numbers, and of their blocks.

    manifest: its counts are filled in here; encodings names what to take blocks of,
    none for an archive without blocks. Blocks that are not there are left out. revisions:
    of the memory up to the manifest's; None for an archive without a history. signer: None
    for an archive without a signature. pause: called after each document and block; it may
    wait, or raise to stop. Raises
    ArchiveSourceError when a document goes away meanwhile: try again.
    """
    wanted = frozenset(numbers)
    present = {
        encoding.encoding_id: wanted.intersection(store.block_numbers(memory, encoding.encoding_id))
        for encoding in manifest.encodings
    }
    counted = replace(
        manifest,
        documents=len(wanted),
        revisions=None if revisions is None else len(revisions),
        encodings=tuple(
            replace(encoding, blocks=len(present[encoding.encoding_id]))
            for encoding in manifest.encodings
        ),
    )
    stored = store.iter_document_json(memory)
    blocks = {
        encoding.encoding_id: _pausing(
            _stored_blocks(store, memory, encoding, present[encoding.encoding_id]), pause
        )
        for encoding in manifest.encodings
    }
    yield from _write(
        counted,
        _pausing((text for number, text in stored if number in wanted), pause),
        blocks,
        ArchiveLimits(),
        revisions=map(encode_revision, revisions or ()),
        signer=signer,
    )


def _pausing(items: Iterable[Item], pause: Callable[[], None]) -> Iterator[Item]:
    for item in items:
        yield item
        pause()


def _stored_blocks(
    store: BlockReader, memory: MemoryUid, encoding: ArchivedEncoding, numbers: frozenset[int]
) -> Iterator[KVBlock]:
    place = memory, encoding.encoding_id, encoding.layout
    contents = (part for part in store.iter_content(*place) if part.number in numbers)
    for part in store.iter_routing(*place):
        if part.number not in numbers:
            continue
        content = next(contents, None)
        if content is None or content.number != part.number:
            raise ArchiveSourceError(f"the block of document {part.number} went away")
        yield KVBlock(
            part.number, part.tokens, part.routing_key_LCE, content.key_LCE, content.value_LCE
        )


def stage_archive(path: Path, pieces: Iterable[bytes]) -> int:
    """Writes an archive to a new file, so that its size is known. Returns that.

    Leaves no file behind when it fails. Raises StorageFullError, StorageError, and
    what `pieces` raises.
    """
    size = 0
    try:
        with path.open("xb") as file:
            try:
                for piece in pieces:
                    size += file.write(piece)
            except BaseException:
                path.unlink()
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(f"no room to stage the archive: {error}") from error
        raise StorageError(str(error)) from error
    return size


def staged_pieces(path: Path, piece_bytes: int = _READ_BYTES) -> Iterator[bytes]:
    """The bytes of a staged archive in pieces of a size that a message can carry."""
    with path.open("rb") as file:
        while piece := file.read(piece_bytes):
            yield piece
