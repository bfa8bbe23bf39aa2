"""A verified archive becomes a memory.

The memory is IMPORTING while it is filled, in batches under its write lock, and
becomes ACTIVE in the same transaction that records the call's reply. Whatever
goes wrong before that, it is deleted again; after a crash, reconcile does so.

What it is filled with, and what of an archive is believed, is in `memsvc.filling`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from memsvc import errors, validation
from memsvc.api_error import ApiError
from memsvc.application import Application
from memsvc.deletion import apart
from memsvc.filling import Imported, fill, forbidden
from memsvc.limits import memories_exceeded
from memsvc.packing import DOCUMENT_BYTES, WINDOW_TURNS, policy
from storage.archive import Archive, Manifest
from storage.catalog import (
    AlreadyExistsError,
    LimitReachedError,
    MemoryRow,
    MemoryState,
    NotFoundError,
    Packing,
    PackingMode,
    RequestRecord,
)
from storage.failpoints import Failpoint, reach

#: Makes the call's record from the memory as it will be, and what was reused.
Record = Callable[["Imported"], RequestRecord | None]


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


async def drop_abandoned(application: Application, tenant_uid: str = "") -> None:
    """Deletes imported memories that no running call fills: one failed and could not undo it.

    tenant_uid: empty for those of all tenants.
    """
    for row in await application.catalog.memories_in_state(MemoryState.IMPORTING, tenant_uid):
        if row.uid not in application.importing:
            with apart(row):
                await _undo(application, row)


async def _import(
    application: Application, archive: Archive, new: MemoryRow, record: Record
) -> Imported:
    row = await _begin(application, new)
    reach(Failpoint.IMPORT_CREATED)
    try:
        imported = await fill(application, archive, row)
        manifest = archive.manifest
        # As activation will make it: the reply is recorded in that transaction.
        imported.memory = replace(
            imported.memory,
            state=MemoryState.ACTIVE,
            version=imported.memory.version + 1,
            revision=manifest.revision,
            last_number=manifest.last_number,
        )
        imported.memory = await application.catalog.activate_memory(
            row.uid,
            request=record(imported),
            last_number=manifest.last_number,
            revision=manifest.revision,
        )
        reach(Failpoint.IMPORT_ACTIVATED)
    except BaseException:
        await _undo(application, row)
        raise
    finally:
        # Also when the caller left just as it was committed: then it stays.
        application.progress.publish(row.uid)
        application.encoding.wake()
    return imported


async def _begin(application: Application, new: MemoryRow) -> MemoryRow:
    """Makes the memory, empty. Where the caller leaves meanwhile it is taken back."""
    locks = application.writes.locks

    async def create() -> MemoryRow:
        return await locks.run_whole(new.tenant_uid, new.uid, lambda: _create(application, new))

    try:
        try:
            return await create()
        except AlreadyExistsError:
            await drop_abandoned(application, new.tenant_uid)
            return await create()
    except AlreadyExistsError as error:
        raise errors.already_exists("memory_id") from error
    except asyncio.CancelledError:
        async with locks.exclusive(new.tenant_uid, new.uid):
            pass  # What was begun has ended.
        await _undo(application, new)
        raise


async def _create(application: Application, new: MemoryRow) -> MemoryRow:
    quotas = await application.limiter.quotas(new.tenant_uid)
    sealed = await application.fields.sealed(new)
    try:
        return await application.catalog.create_memory(
            sealed.tenant_uid,
            sealed.memory_id,
            sealed.display_name,
            sealed.labels,
            sealed.packing,
            MemoryState.IMPORTING,
            None,
            uid=sealed.uid,
            retention_s=sealed.retention_s,
            most=quotas.max_memories_per_tenant,
        )
    except (AlreadyExistsError, LimitReachedError, NotFoundError) as error:
        await application.fields.forget(new)
        if isinstance(error, LimitReachedError):
            raise memories_exceeded(error) from error
        raise


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


async def _undo(application: Application, row: MemoryRow) -> None:
    """Deletes what was made of the memory, unless it was committed or deleted already."""
    try:
        await application.writes.delete_memory(row, None, state=MemoryState.IMPORTING)
    except NotFoundError:
        return
