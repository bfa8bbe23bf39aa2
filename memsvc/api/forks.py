"""ForkMemory and RestoreMemory."""

from __future__ import annotations

from collections.abc import Sequence

from memsvc import errors, names, validation
from memsvc.api.fingerprint import message_fingerprint
from memsvc.api.memories import (
    check_memory_quota,
    check_still_there,
    find_active_memory,
    write_request,
)
from memsvc.application import Application
from memsvc.convert import memory_to_wire
from memsvc.forking import fork_memory, restore_memory
from memsvc.past import check_as_of
from memsvc.v1 import memory_service_pb2 as pb
from storage.catalog import EncodingRow, MemoryRow
from storage.store import KeyMissingError


class ForksHandler:
    """Memories out of memories."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def fork_memory(self, request: pb.ForkMemoryRequest) -> pb.ForkMemoryResponse:
        """The reply is recorded with the row, so a retry gets the same memory."""
        parent_id = names.parse_memory("name", request.name)
        validation.check_request_id(request.request_id)
        validation.check_display_name("display_name", request.display_name)
        check_as_of(request)
        if request.memory_id:
            names.check_id("memory_id", request.memory_id)
        call = await write_request(
            self._app,
            "name",
            request.name,
            method="ForkMemory",
            request_id=request.request_id,
            fingerprint=message_fingerprint(request),
        )
        before = await self._app.writes.first_reply(call)
        if before is not None:
            made = pb.ForkMemoryResponse.FromString(before).memory
            await check_still_there(self._app, made.uid, "memory_id")
        else:
            await find_active_memory(self._app, "name", request.name)
            await check_memory_quota(self._app, call.tenant_uid)
            self._app.encoding.check_backpressure(call.tenant_uid, 0)
            wanted = pb.ForkMemoryRequest()
            wanted.CopyFrom(request)
            wanted.memory_id = request.memory_id or names.new_memory_id()
            before = await fork_memory(self._app, call, parent_id, wanted, _forked)
        response = pb.ForkMemoryResponse.FromString(before)
        try:
            await self._app.fields.opened_reply(call.tenant_uid, response.memory)
        except KeyMissingError as error:
            # It was made, and deleted since.
            raise errors.memory_not_found("memory_id") from error
        return response

    async def restore_memory(self, request: pb.RestoreMemoryRequest) -> pb.RestoreMemoryResponse:
        """Idempotent by request_id."""
        memory_id = names.parse_memory("name", request.name)
        validation.check_request_id(request.request_id)
        if request.revision < 1:
            raise errors.field_invalid("revision", "must be a revision, from 1")
        call = await write_request(
            self._app,
            "name",
            request.name,
            method="RestoreMemory",
            request_id=request.request_id,
            fingerprint=message_fingerprint(request),
        )

        def reply(revision: int, removed: int, missing: int) -> bytes:
            return pb.RestoreMemoryResponse(
                revision=revision, documents_removed=removed, documents_missing=missing
            ).SerializeToString()

        answer = await restore_memory(self._app, call, memory_id, request.revision, reply)
        return pb.RestoreMemoryResponse.FromString(answer)


def _forked(row: MemoryRow, encodings: Sequence[EncodingRow], missing: int) -> bytes:
    """What is recorded: the text in it sealed, as it must not outlive the memory."""
    memory = memory_to_wire(row, encodings)
    return pb.ForkMemoryResponse(memory=memory, documents_missing=missing).SerializeToString()
