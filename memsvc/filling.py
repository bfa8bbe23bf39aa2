"""What a verified archive holds goes into the memory that is made of it.

Documents and revisions keep their numbers, so that the past reads as it did. An archive's
checksums say that it is whole, not that its maker meant well. So every text is held to the
limits of the public API, and blocks are taken over for models that this server knows, by
identity, and for documents that came along.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from memsvc import errors, validation
from memsvc.api_error import ApiError
from memsvc.application import Application
from memsvc.config import MIB
from memsvc.encoding.texts import Target, has_text
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.writes import memory_uid
from storage.archive import Archive, ArchivedEncoding, ArchivedRevision
from storage.catalog import (
    ConflictError,
    DocumentRow,
    MemoryRow,
    MemoryState,
    ModelRow,
    NotFoundError,
    RevisionRow,
)
from storage.documents import Source, TextSource, text_bytes
from storage.failpoints import Failpoint, reach
from storage.layout import KVBlock, KVLayout
from storage.store import StoredDocument, TenantStore

_T = TypeVar("_T")
_BATCH_DOCUMENTS = 500
_BATCH_BYTES = 4 * MIB
_BATCH_BLOCKS = 1000
_BATCH_REVISIONS = 1000
#: How far the clock of the server that wrote an archive may be ahead: what is of the future
#: would outlive a memory's retention.
_AHEAD_US = 86_400 * 1_000_000


@dataclass
class Imported:
    """memory: its row, ACTIVE at the end. reused: blocks taken over, by model id."""

    memory: MemoryRow
    documents: int = 0
    reused: dict[str, int] = field(default_factory=dict)

    @property
    def to_encode(self) -> int:
        """Documents without a block under the model that answers."""
        return self.documents - self.reused.get(self.memory.default_model_id, 0)


def forbidden(problem: str) -> ApiError:
    """problem: of the archive, without repeating what is in it."""
    return ApiError(ErrorReason.ARCHIVE_FORBIDDEN, f"the archive is refused: {problem}")


async def fill(application: Application, archive: Archive, row: MemoryRow) -> Imported:
    """Documents, revisions, and the blocks of models that this server knows.

    Raises ARCHIVE_FORBIDDEN, MEMORY_NOT_FOUND when it is deleted meanwhile, quota and
    storage errors; what was filled then is left to be undone.
    """
    imported = Imported(row)
    documents = archive.documents()
    past = _Past()
    async with aclosing(_ahead(lambda: _next_documents(documents))) as batches:
        async for batch in batches:
            imported.memory = await _add_documents(application, imported.memory, batch)
            imported.documents += len(batch)
            past.take(batch)
    told = archive.revisions() if archive.manifest.revisions else iter(past.revisions())
    while revisions := await asyncio.to_thread(_take, told, _BATCH_REVISIONS):
        _check_times(revisions)
        await application.catalog.commit_import_revisions(
            [_revision_row(row, revision) for revision in revisions]
        )
    for encoding in archive.manifest.encodings:
        model = await _same_model(application, encoding)
        if model is not None:
            await application.catalog.ensure_encoding(row.uid, model.model_id, model.identity)
            await _add_blocks(application, archive, imported, model)
    return imported


async def _ahead(take: Callable[[], list[_T]]) -> AsyncGenerator[list[_T], None]:
    """Batches until an empty one, each read in a thread while the one before is written."""
    coming = asyncio.ensure_future(asyncio.to_thread(take))
    try:
        while batch := await asyncio.shield(coming):
            coming = asyncio.ensure_future(asyncio.to_thread(take))
            yield batch
    finally:
        # Whoever leaves early closes the archive: not while the thread reads it.
        await asyncio.wait([coming])
        coming.cancelled() or coming.exception()


class _Past:
    """Revisions as far as documents tell of them, for archives that have none."""

    def __init__(self) -> None:
        self._found: dict[int, ArchivedRevision] = {}

    def take(self, documents: Sequence[StoredDocument]) -> None:
        """Documents in their order."""
        for document in documents:
            before = self._found.get(document.revision)
            self._found[document.revision] = ArchivedRevision(
                document.revision,
                max(document.created_at_us, before.created_at_us if before else 0),
                before.documents_added + 1 if before else 1,
                0,
                document.number,
            )

    def revisions(self) -> Sequence[ArchivedRevision]:
        """Ascending."""
        return list(self._found.values())


def _revision_row(memory: MemoryRow, revision: ArchivedRevision) -> RevisionRow:
    return RevisionRow(
        memory_uid=memory.uid,
        revision=revision.revision,
        created_us=revision.created_at_us,
        documents_added=revision.documents_added,
        documents_removed=revision.documents_removed,
        last_number=revision.last_number,
    )


def _next_documents(documents: Iterator[StoredDocument]) -> list[StoredDocument]:
    """The next batch, each held to the API's limits."""
    batch: list[StoredDocument] = []
    size = 0
    for document in documents:
        _check_source(document.source)
        _check_times([document])
        if document.revision < (batch[-1].revision if batch else 1):
            raise forbidden("its documents do not lie in the order of their revisions")
        batch.append(document)
        size += text_bytes(document.source)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            break
    return batch


async def _add_documents(
    application: Application, row: MemoryRow, batch: list[StoredDocument]
) -> MemoryRow:
    """One batch, as an append does it: LMDB, then SQL."""
    rows = [DocumentRow(d.number, d.revision, d.created_at_us, text_bytes(d.source)) for d in batch]
    await _check_quota(application, row, rows)
    async with application.writes.locks.exclusive(row.tenant_uid, row.memory_id):
        # Under the lock: a deletion cannot come between the check and the write.
        await _still_importing(application, row)
        await application.stores.run(
            row.tenant_uid, lambda store: store.put_documents(memory_uid(row), batch)
        )
        reach(Failpoint.IMPORT_STORED)
        try:
            filled = await application.catalog.commit_import(row.uid, rows)
        except ConflictError as error:
            raise forbidden("its documents do not lie in the order of their revisions") from error
    reach(Failpoint.IMPORT_APPENDED)
    return filled


async def _still_importing(application: Application, row: MemoryRow) -> None:
    try:
        current = await application.catalog.get_memory_by_uid(row.uid)
    except NotFoundError as error:
        raise errors.memory_not_found("memory_id") from error
    if current.state is not MemoryState.IMPORTING:
        raise errors.memory_not_found("memory_id")


async def _check_quota(
    application: Application, row: MemoryRow, rows: Sequence[DocumentRow]
) -> None:
    (await application.limiter.quotas(row.tenant_uid)).check_memory(
        row.document_count + len(rows),
        row.text_bytes + sum(document.text_bytes for document in rows),
    )


async def _same_model(application: Application, encoding: ArchivedEncoding) -> ModelRow | None:
    """The model these blocks are valid for, if this server knows it: by whatever name."""
    found = await application.catalog.models_of(encoding.identity)
    same = [model for model in found if model.layout == encoding.layout]
    same.sort(key=lambda model: (model.model_id != encoding.model_id, not model.default))
    return same[0] if same else None


async def _add_blocks(
    application: Application, archive: Archive, imported: Imported, model: ModelRow
) -> None:
    """Takes over one model's blocks, and moves the watermark over those without a gap.

    Blocks behind a gap are found by the encoding queue when it gets there.
    """
    row = imported.memory
    target = Target.of(row.uid, model.identity, model.layout)
    blocks = archive.blocks(target.encoding)
    numbers = iter(await application.catalog.live_numbers(row.uid, 1, row.last_number))
    expected: int | None = next(numbers, None)
    up_to = documents = tokens = stored = 0
    async with aclosing(_ahead(lambda: _next_blocks(blocks, model.layout))) as batches:
        async for batch in batches:
            size = await application.stores.run(row.tenant_uid, _write_blocks, target, batch)
            reach(Failpoint.IMPORT_BLOCKS_STORED)
            imported.reused[model.model_id] = imported.reused.get(model.model_id, 0) + len(batch)
            contiguous: list[KVBlock] = []
            for block in batch:
                if block.number != expected:
                    expected = None
                    break
                contiguous.append(block)
                expected = next(numbers, None)
            if contiguous:
                up_to, documents = contiguous[-1].number, documents + len(contiguous)
                tokens += sum(block.tokens for block in contiguous)
                stored += size * len(contiguous) // len(batch)
    if up_to:
        try:
            await application.catalog.commit_encoded(
                row.uid, model.model_id, model.identity, up_to, documents, tokens, stored, {}
            )
        except ConflictError:
            # The model has other weights since: all is encoded afresh, as in any memory.
            imported.reused.pop(model.model_id, None)
            return
        reach(Failpoint.IMPORT_ENCODED)


def _next_blocks(blocks: Iterator[KVBlock], layout: KVLayout) -> list[KVBlock]:
    """As many as one transaction of the store takes well: fewer and larger ones sync less."""
    batch: list[KVBlock] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += layout.block_bytes(block.tokens)
        if len(batch) == _BATCH_BLOCKS or size >= _BATCH_BYTES:
            break
    return batch


def _write_blocks(store: TenantStore, target: Target, blocks: list[KVBlock]) -> int:
    """Stored bytes. Raises MEMORY_NOT_FOUND when the memory was deleted meanwhile.

    Nothing else takes a document from a memory that is being imported, and deletions run in
    this same thread: where one text is, all of them are.
    """
    if not has_text(store, target.memory, blocks[0].number):
        raise errors.memory_not_found("memory_id")
    return store.put_blocks(target.memory, target.encoding, target.layout, blocks)


def _take(items: Iterator[_T], count: int) -> list[_T]:
    return list(islice(items, count))


def _check_times(made: Sequence[StoredDocument | ArchivedRevision]) -> None:
    """Raises ARCHIVE_FORBIDDEN for what was made at a time that lies ahead."""
    latest_us = time.time_ns() // 1000 + _AHEAD_US
    if any(one.created_at_us > latest_us for one in made):
        raise forbidden("it holds times that lie ahead of this server's clock")


def _check_source(source: Source) -> None:
    """Raises ARCHIVE_FORBIDDEN for a document that the API would not have taken."""
    try:
        if isinstance(source, TextSource):
            validation.check_text("text", source.text, validation.MAX_DOCUMENT_TEXT)
            validation.check_string("title", source.title, validation.MAX_TITLE)
            validation.check_metadata("metadata", source.metadata)
            return
        validation.check_count("turns", len(source.turns), low=1, high=validation.MAX_TURNS)
        for turn in source.turns:
            validation.check_text("text", turn.text, validation.MAX_TURN_TEXT)
            validation.check_string("speaker", turn.speaker, validation.MAX_SPEAKER)
            validation.check_string("session", turn.session, validation.MAX_SESSION)
            validation.check_metadata("metadata", turn.metadata)
    except ApiError as error:
        raise forbidden(f"a document breaks a limit: {error.message}") from error
