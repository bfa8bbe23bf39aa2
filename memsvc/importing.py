"""A verified archive becomes a memory.

The memory is IMPORTING while it is filled, in batches under its write lock, and
becomes ACTIVE in the same transaction that records the call's reply. Whatever
goes wrong before that, it is deleted again; after a crash, reconcile does so.

An archive's checksums say that it is whole, not that its maker meant well. So
every text is held to the limits of the public API, and blocks are taken over
for models that this server knows, by identity, and for documents that came along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

from memsvc import errors, validation
from memsvc.application import Application
from memsvc.config import MIB
from memsvc.encoding.texts import Target, write_live_blocks
from memsvc.errors import ApiError
from memsvc.packing import DOCUMENT_BYTES, WINDOW_TURNS, policy
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.writes import memory_uid
from storage.archive import Archive, ArchivedEncoding, Manifest
from storage.catalog import (
    AlreadyExistsError,
    DocumentRow,
    MemoryRow,
    MemoryState,
    ModelRow,
    NotFoundError,
    Packing,
    PackingMode,
    RequestRecord,
)
from storage.documents import Source, TextSource, text_bytes
from storage.failpoints import Failpoint, reach
from storage.layout import KVBlock
from storage.store import StoredDocument

_T = TypeVar("_T")
_BATCH_DOCUMENTS = 500
_BATCH_BYTES = 4 * MIB
_BATCH_BLOCKS = 32

#: Makes the call's record from the memory as it will be, and what was reused.
Record = Callable[["Imported"], RequestRecord | None]


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


async def import_archive(
    application: Application,
    archive: Archive,
    new: MemoryRow,
    record: Record,
) -> Imported:
    """Fills and activates the memory `new`. Nothing of it remains when this raises.

    Raises ALREADY_EXISTS, ARCHIVE_FORBIDDEN, quota and storage errors, and what the
    catalog raises for a repeated request.
    """
    application.importing.add(new.uid)
    try:
        return await _import(application, archive, new, record)
    finally:
        application.importing.discard(new.uid)


async def drop_abandoned(application: Application) -> None:
    """Deletes imported memories that no running call fills: one failed and could not undo it."""
    for row in await application.catalog.memories_in_state(MemoryState.IMPORTING):
        if row.uid not in application.importing:
            await _undo(application, row)


async def _import(
    application: Application, archive: Archive, new: MemoryRow, record: Record
) -> Imported:
    try:
        row = await _create(application, new)
    except AlreadyExistsError:
        await drop_abandoned(application)
        try:
            row = await _create(application, new)
        except AlreadyExistsError as error:
            raise errors.already_exists("memory_id") from error
    reach(Failpoint.IMPORT_CREATED)
    try:
        imported = await _fill(application, archive, row)
        imported.memory = replace(
            imported.memory, state=MemoryState.ACTIVE, version=imported.memory.version + 1
        )
        imported.memory = await application.catalog.activate_memory(
            row.uid, request=record(imported), last_number=archive.manifest.last_number
        )
        reach(Failpoint.IMPORT_ACTIVATED)
    except BaseException:
        await _undo(application, row)
        raise
    application.progress.publish(row.uid)
    application.encoding.wake()
    return imported


async def _create(application: Application, new: MemoryRow) -> MemoryRow:
    new = await application.fields.sealed(new)
    return await application.catalog.create_memory(
        new.tenant_uid,
        new.memory_id,
        new.display_name,
        new.labels,
        new.packing,
        MemoryState.IMPORTING,
        None,
        uid=new.uid,
        retention_s=new.retention_s,
    )


def row_from_manifest(manifest: Manifest, empty: MemoryRow) -> MemoryRow:
    """`empty` with what the manifest says, checked. Raises ARCHIVE_FORBIDDEN."""
    try:
        packing = _packing(manifest)
        return replace(
            empty,
            display_name=empty.display_name
            or validation.check_display_name("display_name", manifest.display_name),
            labels=validation.check_labels("labels", manifest.labels),
            packing=packing,
        )
    except (ApiError, ValueError) as error:
        raise forbidden("its manifest breaks a limit of this server") from error


def forbidden(problem: str) -> ApiError:
    """problem: of the archive, without repeating what is in it."""
    return ApiError(ErrorReason.ARCHIVE_FORBIDDEN, f"the archive is refused: {problem}")


def _packing(manifest: Manifest) -> Packing:
    archived = manifest.packing
    mode = PackingMode(archived.mode)
    made = policy(mode, archived.window_turns, archived.max_document_bytes)
    if made.window_turns:
        _within(made.window_turns, WINDOW_TURNS)
    if made.max_document_bytes:
        _within(made.max_document_bytes, DOCUMENT_BYTES)
    if (made.window_turns, made.max_document_bytes) != (
        archived.window_turns,
        archived.max_document_bytes,
    ):
        raise ValueError("a packing policy that no memory can have")
    return made


def _within(value: int, limits: tuple[int, int]) -> None:
    low, high = limits
    validation.check_range("packing", value, low=low, high=high)


async def _fill(application: Application, archive: Archive, row: MemoryRow) -> Imported:
    imported = Imported(row)
    documents = archive.documents()
    while batch := await asyncio.to_thread(_next_documents, documents):
        imported.memory = await _add_documents(application, imported.memory, batch)
        imported.documents += len(batch)
    for encoding in archive.manifest.encodings:
        model = await _same_model(application, encoding)
        if model is not None:
            await application.catalog.ensure_encoding(row.uid, model.model_id, model.identity)
            await _add_blocks(application, archive, imported, model)
    return imported


def _next_documents(documents: Iterator[StoredDocument]) -> list[StoredDocument]:
    """The next batch, each held to the API's limits."""
    batch: list[StoredDocument] = []
    size = 0
    for document in documents:
        _check_source(document.source)
        batch.append(document)
        size += text_bytes(document.source)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            break
    return batch


async def _add_documents(
    application: Application, row: MemoryRow, batch: list[StoredDocument]
) -> MemoryRow:
    """One batch, as an append does it: LMDB, then SQL. Numbers stay; revisions are new."""
    revision = row.revision + 1
    stored = [replace(document, revision=revision) for document in batch]
    rows = [DocumentRow(d.number, revision, d.created_at_us, text_bytes(d.source)) for d in stored]
    await _check_quota(application, row, rows)
    async with application.writes.locks.exclusive(row.tenant_uid, row.memory_id):
        # Under the lock: a deletion cannot come between the check and the write.
        await _still_importing(application, row)
        await application.stores.run(
            row.tenant_uid, lambda store: store.put_documents(memory_uid(row), stored)
        )
        reach(Failpoint.IMPORT_STORED)
        filled = await application.catalog.commit_append(row.uid, row.revision, rows, None)
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
    """The model these blocks are valid for, if this server knows it."""
    try:
        model = await application.catalog.get_model(encoding.model_id)
    except NotFoundError:
        return None
    same = model.identity == encoding.identity and model.layout == encoding.layout
    return model if same else None


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
    while batch := await asyncio.to_thread(_take, blocks, _BATCH_BLOCKS):
        size, written = await application.stores.run(
            row.tenant_uid, write_live_blocks, target, batch
        )
        reach(Failpoint.IMPORT_BLOCKS_STORED)
        imported.reused[model.model_id] = imported.reused.get(model.model_id, 0) + len(written)
        contiguous: list[KVBlock] = []
        for block in written:
            if block.number != expected:
                expected = None
                break
            contiguous.append(block)
            expected = next(numbers, None)
        if contiguous:
            up_to, documents = contiguous[-1].number, documents + len(contiguous)
            tokens += sum(block.tokens for block in contiguous)
            stored += size * len(contiguous) // len(written)
    if up_to:
        await application.catalog.commit_encoded(
            row.uid, model.model_id, model.identity, up_to, documents, tokens, stored, {}
        )
        reach(Failpoint.IMPORT_ENCODED)


def _take(items: Iterator[_T], count: int) -> list[_T]:
    return list(islice(items, count))


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


async def _undo(application: Application, row: MemoryRow) -> None:
    """Deletes what was made of the memory. A caller that deleted it already is no error."""
    try:
        await application.writes.delete_memory(row, None)
    except NotFoundError:
        return
