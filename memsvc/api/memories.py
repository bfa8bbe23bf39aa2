"""CreateMemory, GetMemory, ListMemories, UpdateMemory, DeleteMemory."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

from memsvc import errors, names, validation
from memsvc.api.fingerprint import message_fingerprint
from memsvc.api_error import ApiError
from memsvc.application import Application
from memsvc.convert import memory_to_wire, packing_from_wire
from memsvc.etags import expected_version
from memsvc.paging import fitting
from memsvc.principal import current_principal
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.writes import Request
from storage.catalog import (
    AlreadyExistsError,
    ConflictError,
    Cursor,
    EncodingRow,
    EncodingState,
    MemoryRow,
    MemoryState,
    ModelRow,
    NotFoundError,
    PackingMode,
    RequestRecord,
)
from storage.store import KeyMissingError

_UPDATABLE = ("display_name", "labels", "retention")


class MemoriesHandler:
    """Memories as resources; what is in them is DocumentsHandler's."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self._catalog = application.catalog

    async def create_memory(self, request: pb.CreateMemoryRequest) -> resources_pb2.Memory:
        """The reply is recorded with the row, so a retry gets the same memory."""
        tenant = current_principal().tenant_uid
        fields = self._app.fields
        call = Request(
            tenant_uid=tenant,
            method="CreateMemory",
            request_id=validation.check_request_id(request.request_id),
            fingerprint=await fields.fingerprint(tenant, message_fingerprint(request)),
            field="memory",
        )
        memory_id = request.memory_id or names.new_memory_id()
        row = self._new_row(tenant, names.check_id("memory_id", memory_id), request.memory)
        model = await self._catalog.default_model_of(tenant)
        row = replace(row, default_model_id=model.model_id if model is not None else "")
        # To its end also when the caller leaves: no key is to be left without its memory.
        # The lock is that of its own uid: nobody waits for it.
        memory = await self._app.writes.locks.run_whole(
            tenant, row.uid, lambda: self._make(call, row, model)
        )
        self._app.encoding.wake()
        if memory.uid != row.uid:
            await check_still_there(self._app, memory.uid, "memory")
        return await self._opened(tenant, memory)

    async def _make(
        self, call: Request, row: MemoryRow, model: ModelRow | None
    ) -> resources_pb2.Memory:
        """The new memory, or the one that this call made before, as it was recorded: with its
        text sealed, which must not outlive the memory.
        """
        fields = self._app.fields
        kept = await fields.sealed(row)
        reply = memory_to_wire(kept, _empty_encodings(row, model)).SerializeToString()

        async def attempt() -> bytes:
            await self._insert(kept, call.record(reply))
            return reply

        try:
            answer = await self._app.writes.once(call, attempt)
        except ApiError:
            # Only what says that there is no such row: one whose database went away at its
            # commit may be there, and `reconcile` knows.
            await fields.forget(row)
            raise
        memory = resources_pb2.Memory.FromString(answer)
        if memory.uid != row.uid:
            await fields.forget(row)
        return memory

    async def _opened(self, tenant: str, memory: resources_pb2.Memory) -> resources_pb2.Memory:
        """A recorded reply as it was sent."""
        try:
            return await self._app.fields.opened_reply(tenant, memory)
        except KeyMissingError as error:
            raise errors.memory_not_found("memory") from error

    async def _insert(self, row: MemoryRow, record: RequestRecord | None) -> None:
        try:
            await self._catalog.create_memory(
                row.tenant_uid,
                row.memory_id,
                row.display_name,
                row.labels,
                row.packing,
                row.state,
                record,
                uid=row.uid,
                created_us=row.created_us,
                retention_s=row.retention_s,
                most=(await self._app.limiter.quotas(row.tenant_uid)).max_memories_per_tenant,
            )
        except AlreadyExistsError as error:
            raise errors.already_exists("memory_id") from error
        except NotFoundError as error:
            # The tenant, whose keys open nothing any more.
            raise errors.credential_invalid() from error

    async def get_memory(self, request: pb.GetMemoryRequest) -> resources_pb2.Memory:
        """One memory with how far it is encoded."""
        memory_id, caller = names.parse_memory("name", request.name), current_principal()
        try:
            row, encodings = await self._catalog.show_memory(
                caller.tenant_uid, memory_id, only=caller.memories
            )
        except NotFoundError as error:
            raise errors.memory_not_found("name") from error
        return memory_to_wire(await self._app.fields.opened(row), encodings)

    async def list_memories(self, request: pb.ListMemoriesRequest) -> pb.ListMemoriesResponse:
        """Newest first. A page may be shorter than asked, for its bytes."""
        caller = current_principal()
        binding = (caller.tenant_uid, "ListMemories", *sorted(caller.memories or ()))
        limit = validation.check_page_size(request.page_size)
        position = self._app.page_tokens.open(binding, request.page_token)
        rows, encodings, after = await self._catalog.show_memories(
            caller.tenant_uid, limit, cursor(position), caller.memories
        )
        opened = await self._app.fields.those_opened(rows)
        memories = [memory_to_wire(row, encodings.get(row.uid, ())) for row in opened]
        kept = fitting(memory.ByteSize() for memory in memories)
        if kept < len(memories):
            after = (opened[kept - 1].created_us, opened[kept - 1].uid)
        return pb.ListMemoriesResponse(
            memories=memories[:kept],
            next_page_token=self._app.page_tokens.issue(binding, after) if after else "",
        )

    async def update_memory(self, request: pb.UpdateMemoryRequest) -> resources_pb2.Memory:
        """Field masks after AIP-134: without one, every field that is set."""
        wanted = request.memory
        names.parse_memory("memory.name", wanted.name)
        validation.check_string("memory.etag", wanted.etag, validation.MAX_ETAG)
        changes = _changes(request)
        row = await self._find("memory.name", wanted.name)
        if row.state is not MemoryState.ACTIVE:
            raise errors.memory_not_active(row.state.name, "memory.name")
        version = expected_version(row, wanted.etag, "memory.etag")
        if changes != _Changes():
            try:
                row = await self._update(row, changes, version)
            except NotFoundError as error:
                raise errors.memory_not_found("memory.name") from error
            except ConflictError as error:
                raise errors.etag_mismatch("memory.etag") from error
        return await shown(self._app, row)

    async def _update(self, row: MemoryRow, changes: _Changes, version: int | None) -> MemoryRow:
        """Name and labels are sealed together, so what is not changed is read first. Raises
        NotFoundError, ConflictError.

        Under the memory's lock: sealing makes a key where there is none, and must not after a
        deletion has destroyed it.
        """
        name, labels = changes.display_name, changes.labels

        async def work(memory: MemoryRow) -> MemoryRow:
            old = await self._app.fields.opened(memory)
            new = await self._app.fields.sealed(
                replace(
                    old,
                    display_name=old.display_name if name is None else name,
                    labels=old.labels if labels is None else labels,
                )
            )
            return await self._catalog.update_memory(
                memory.tenant_uid,
                memory.memory_id,
                new.display_name,
                new.labels,
                version,
                retention_s=changes.retention_s,
                uid=memory.uid,
            )

        return await self._app.writes.change(row, work)

    async def delete_memory(self, request: pb.DeleteMemoryRequest) -> None:
        """When it returns, no worker, file or row holds any of the memory; with allow_missing,
        nor of one of its name whose deletion was under way.
        """
        names.parse_memory("name", request.name)
        validation.check_string("etag", request.etag, validation.MAX_ETAG)
        try:
            row = await self._find("name", request.name)
            await self._app.writes.delete_memory(row, expected_version(row, request.etag, "etag"))
            return
        except NotFoundError as error:
            if not request.allow_missing:
                raise errors.memory_not_found() from error
        except ApiError as error:
            if error.reason != ErrorReason.MEMORY_NOT_FOUND or not request.allow_missing:
                raise
        except ConflictError as error:
            raise errors.etag_mismatch("etag") from error
        await self._finish_deletions(request.name)

    async def _finish_deletions(self, name: str) -> None:
        """Returns when nothing is left of what had the name and is being deleted."""
        memory_id, caller = names.parse_memory("name", name), current_principal()
        for row in await self._catalog.memories_in_state(MemoryState.DELETING, caller.tenant_uid):
            reached = caller.memories is None or row.uid in caller.memories
            if row.memory_id == memory_id and reached:
                await self._app.writes.finish_deletion(row)

    async def _find(self, field: str, name: str) -> MemoryRow:
        return await find_memory(self._app, field, name)

    def _new_row(self, tenant_uid: str, memory_id: str, wanted: resources_pb2.Memory) -> MemoryRow:
        """The row as it will be, checked; made here because the recorded reply shows it."""
        now_us = time.time_ns() // 1000
        return MemoryRow(
            uid=secrets.token_hex(16),
            tenant_uid=tenant_uid,
            memory_id=memory_id,
            display_name=validation.check_display_name("memory.display_name", wanted.display_name),
            labels=validation.check_labels("memory.labels", wanted.labels),
            packing=packing_from_wire(
                "memory.packing", wanted.packing, PackingMode(self._app.config.packing)
            ),
            state=MemoryState.ACTIVE,
            revision=0,
            last_number=0,
            deletion_epoch=0,
            document_count=0,
            text_bytes=0,
            created_us=now_us,
            updated_us=now_us,
            version=1,
            retention_s=validation.check_retention("memory.retention", wanted.retention) or None,
        )


@dataclass(frozen=True)
class _Changes:
    """What an update sets; None leaves as it is. A retention of 0 ends one."""

    display_name: str | None = None
    labels: dict[str, str] | None = None
    retention_s: int | None = None


def _changes(request: pb.UpdateMemoryRequest) -> _Changes:
    wanted, paths = request.memory, list(request.update_mask.paths)
    validation.check_mask("update_mask", paths, _UPDATABLE)
    display_name = validation.check_display_name("memory.display_name", wanted.display_name)
    labels = validation.check_labels("memory.labels", wanted.labels)
    retention_s = validation.check_retention("memory.retention", wanted.retention)
    if not paths:
        return _Changes(display_name or None, labels or None, retention_s or None)
    return _Changes(
        display_name if "display_name" in paths else None,
        labels if "labels" in paths else None,
        retention_s if "retention" in paths else None,
    )


def _empty_encodings(row: MemoryRow, model: ModelRow | None) -> list[EncodingRow]:
    """An empty memory is ready under the model that answers for it."""
    if model is None:
        return []
    return [
        EncodingRow(
            memory_uid=row.uid,
            model_id=model.model_id,
            identity=model.identity,
            state=EncodingState.READY,
            encoded_number=0,
            encoded_revision=0,
            encoded_documents=0,
            pending_documents=0,
            quarantined_documents=0,
            tokens=0,
            bytes=0,
            failure="",
        )
    ]


async def check_memory_quota(application: Application, tenant_uid: str) -> None:
    """Raises QUOTA_EXCEEDED when the tenant may have no further memory now, before much work is
    done for one. Of calls at once only the catalog says which are too many.
    """
    quotas = await application.limiter.quotas(tenant_uid)
    if quotas.max_memories_per_tenant:
        quotas.check_memories((await application.catalog.usage(tenant_uid)).memories)


async def shown(application: Application, row: MemoryRow) -> resources_pb2.Memory:
    """A memory with how far it is encoded, as users see it."""
    opened = await application.fields.opened(row)
    return memory_to_wire(opened, await application.catalog.list_encodings(row.uid))


async def find_memory(application: Application, field: str, name: str) -> MemoryRow:
    """The caller's memory of that name, in whatever state but DELETING.

    Another tenant's memory, and one that the key does not reach, answer exactly as a
    missing one: MEMORY_NOT_FOUND.
    """
    memory_id, caller = names.parse_memory(field, name), current_principal()
    try:
        return await application.catalog.get_memory(
            caller.tenant_uid, memory_id, only=caller.memories
        )
    except NotFoundError as error:
        raise errors.memory_not_found(field) from error


async def check_still_there(application: Application, uid: str, field: str) -> None:
    """Raises MEMORY_NOT_FOUND when a memory that a repeated call made was deleted since."""
    try:
        row = await application.catalog.get_memory_by_uid(uid)
    except NotFoundError as error:
        raise errors.memory_not_found(field) from error
    if row.state is MemoryState.DELETING:
        raise errors.memory_not_found(field)


async def write_request(
    application: Application,
    field: str,
    name: str,
    *,
    method: str,
    request_id: str,
    fingerprint: bytes,
) -> Request:
    """A write to one memory that exists.

    A key of some memories is checked here, before a repeated request_id is answered,
    and again under the memory's lock. Its request ids are those of the memory: one
    used elsewhere in the tenant is none of its business.
    """
    caller = current_principal()
    if caller.memories is not None:
        memory = await find_memory(application, field, name)
        request_id = f"{memory.uid}/{request_id}" if request_id else ""
    tenant = caller.tenant_uid
    if request_id:
        fingerprint = await application.fields.fingerprint(tenant, fingerprint)
    memory_id = names.parse_memory(field, name)
    return Request(tenant, method, request_id, fingerprint, field, caller.memories, memory_id)


async def find_active_memory(application: Application, field: str, name: str) -> MemoryRow:
    """As find_memory, and MEMORY_NOT_ACTIVE while an import fills it."""
    row = await find_memory(application, field, name)
    if row.state is not MemoryState.ACTIVE:
        raise errors.memory_not_active(row.state.name, field)
    return row


def cursor(position: list[int | str] | None) -> Cursor | None:
    """A catalog cursor from an opened page token."""
    if position is None:
        return None
    moment, identifier = position
    return int(moment), str(identifier)
