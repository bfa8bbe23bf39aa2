"""ExportMemory and ImportMemory."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator

from memsvc import errors, names, validation
from memsvc.api.fingerprint import StreamFingerprint
from memsvc.api.memories import check_memory_quota, check_still_there, find_active_memory
from memsvc.api_error import ApiError
from memsvc.application import Application
from memsvc.convert import memory_to_wire
from memsvc.exporting import current, stage_export
from memsvc.filling import Imported
from memsvc.importing import import_archive, row_from_manifest
from memsvc.packing import policy
from memsvc.principal import current_principal
from memsvc.progress import TooManySubscribersError
from memsvc.staging import Incoming, Opened, Staged
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.writes import Request
from storage.archive import (
    Archive,
    ArchiveCorruptError,
    ArchiveError,
    ArchiveForbiddenError,
    ArchiveSignatureError,
    ArchiveTruncatedError,
    ArchiveVersionError,
    open_archive,
)
from storage.archive.manifest import VERSION
from storage.catalog import (
    MemoryRow,
    MemoryState,
    NotFoundError,
    PackingMode,
    RequestIdReusedError,
    RequestRecord,
    RequestRepeatedError,
)
from storage.failpoints import Failpoint, reach
from storage.store import KeyMissingError

#: The call's path.
EXPORT = "/memsvc.v1.MemoryService/ExportMemory"

_PUBLIC_KEY = re.compile(r"[0-9a-fA-F]{64}")
#: How a call ends that was cut; to the server a lost client may look like an early end.
_CUT = (ErrorReason.STREAM_TIMEOUT, ErrorReason.ARCHIVE_TRUNCATED)
_PIECE_BYTES = 1024 * 1024
_MAX_DATA_BYTES = 2 * 1024 * 1024


class ArchiveHandler:
    """Memories as files."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self._staging = application.staging

    async def export(
        self, request: pb.ExportMemoryRequest
    ) -> AsyncGenerator[pb.ExportMemoryResponse]:
        """The archive of one revision. Ends with MEMORY_NOT_FOUND when the memory is deleted
        meanwhile, with OFFSET_NOT_AVAILABLE when something of it is.
        """
        name = _kept_name("export", validation.check_request_id(request.request_id))
        if request.offset < 0 or (request.offset and not name):
            raise errors.field_invalid("offset", "goes on with the export of a request_id")
        memory = await find_active_memory(self._app, "name", request.name)
        purpose = f"{memory.uid} {request.without_blocks} {request.signed}"
        if not request.offset:
            self._staging.drop(memory.tenant_uid, name)
        try:
            with self._app.progress.subscribe(memory.uid, appends=False) as news:
                async with self._staging.file(memory.tenant_uid, name) as staged:
                    await self._staged(request, memory, staged, purpose)
                    await current(self._app, memory)
                    staged.keep_as = name
                    total = staged.size
                    async for data in _pieces(staged, request.offset):
                        if news.take() or staged.forgotten:
                            await current(self._app, memory)
                        if staged.forgotten:
                            # No call shows what was deleted, and this archive holds it.
                            raise _offset_not_available("offset", 0)
                        yield pb.ExportMemoryResponse(data=data, total_bytes=total)
                        total = 0
                    staged.keep_as = ""
        except TooManySubscribersError as error:
            raise errors.overloaded() from error

    async def _staged(
        self, request: pb.ExportMemoryRequest, memory: MemoryRow, staged: Staged, purpose: str
    ) -> None:
        """Makes the archive, or finds that the kept one is what is asked for."""
        if request.offset:
            if not staged.fresh and staged.purpose == purpose and request.offset <= staged.size:
                return
            # A wrong question takes nothing from whoever asks the right one.
            staged.keep_as = _kept_name("export", request.request_id)
            mine = staged.purpose == purpose
            raise _offset_not_available("offset", staged.size if mine else 0)
        staged.purpose, staged.memory_uid = purpose, memory.uid
        staged.size = await stage_export(
            self._app,
            memory,
            staged.path,
            staged.key,
            with_blocks=not request.without_blocks,
            signed=request.signed,
        )

    async def import_memory(
        self, messages: AsyncIterator[pb.ImportMemoryRequest]
    ) -> pb.ImportMemoryResponse:
        """Receives all, verifies all, then makes the memory."""
        header = await _header(messages)
        tenant_uid = current_principal().tenant_uid
        name = _kept_name("import", header.request_id)
        if not header.offset:
            self._staging.drop(tenant_uid, name)
        async with self._staging.file(tenant_uid, name) as staged:
            staged.keep_as = name
            if header.offset != staged.size:
                raise _offset_not_available("header.offset", staged.size)
            try:
                await _receive(messages, staged)
                reach(Failpoint.IMPORT_RECEIVED)
                reply = await self._received(staged, header, tenant_uid)
            except ApiError as error:
                if error.reason not in _CUT:
                    staged.keep_as = ""
                raise
            staged.keep_as = ""
            return reply

    async def _received(
        self, staged: Staged, header: pb.ImportMemoryRequest.Header, tenant_uid: str
    ) -> pb.ImportMemoryResponse:
        """Makes the memory of what was received, or answers as before."""
        fingerprint = StreamFingerprint()
        whole = staged.hash.digest()
        for part in (header.memory_id.encode(), header.display_name.encode(), whole):
            fingerprint.add(part)
        digest = await self._app.fields.fingerprint(tenant_uid, fingerprint.digest())
        call = Request(tenant_uid, "ImportMemory", header.request_id, digest, "memory_id")
        before = await self._app.writes.first_reply(call)
        if before is not None:
            return await self._opened(call, before)
        try:
            archive = await asyncio.to_thread(lambda: open_archive(Opened(staged)))
        except ArchiveError as error:
            raise _refused(error) from error
        try:
            if header.signed_by:
                archive.check_signer(header.signed_by)
            return await self._import(archive, header, call)
        except ArchiveError as error:
            raise _refused(error) from error
        finally:
            archive.close()

    async def _import(
        self, archive: Archive, header: pb.ImportMemoryRequest.Header, call: Request
    ) -> pb.ImportMemoryResponse:
        new = row_from_manifest(archive.manifest, _empty_row(call.tenant_uid, header))
        await check_memory_quota(self._app, call.tenant_uid)
        self._app.encoding.check_backpressure(call.tenant_uid, 0)

        def reply(imported: Imported) -> pb.ImportMemoryResponse:
            return pb.ImportMemoryResponse(
                memory=memory_to_wire(imported.memory),
                reused_blocks=sum(imported.reused.values()),
                documents_to_encode=imported.to_encode,
            )

        def record(imported: Imported) -> RequestRecord | None:
            return call.record(reply(imported).SerializeToString())

        try:
            imported = await import_archive(self._app, archive, new, record)
        except RequestRepeatedError as repeated:
            return await self._opened(call, repeated.record.reply)
        except RequestIdReusedError as error:
            raise errors.request_id_reused() from error
        except NotFoundError as error:
            # Deleted while it was filled.
            raise errors.memory_not_found("memory_id") from error
        response = reply(imported)
        encodings = await self._app.catalog.list_encodings(imported.memory.uid)
        opened = await self._app.fields.opened(imported.memory)
        response.memory.CopyFrom(memory_to_wire(opened, encodings))
        return response

    async def _opened(self, call: Request, reply: bytes) -> pb.ImportMemoryResponse:
        """A recorded reply as it was sent; its text was kept sealed."""
        response = pb.ImportMemoryResponse.FromString(reply)
        await check_still_there(self._app, response.memory.uid, call.field)
        try:
            await self._app.fields.opened_reply(call.tenant_uid, response.memory)
        except KeyMissingError as error:
            raise errors.memory_not_found(call.field) from error
        return response


def _kept_name(direction: str, request_id: str) -> str:
    """Under which a cut call's file is kept; empty: it is not."""
    return f"{direction} {request_id}" if request_id else ""


async def _pieces(staged: Staged, offset: int) -> AsyncIterator[bytes]:
    """A staged file from there on, piece by piece; at least one, which may be empty."""
    file = await asyncio.to_thread(Opened, staged)
    try:
        if not staged.keep_as:
            await asyncio.to_thread(staged.path.unlink)
        file.seek(offset)
        piece = await asyncio.to_thread(file.read, _PIECE_BYTES)
        yield piece
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
    finally:
        file.close()


async def _header(messages: AsyncIterator[pb.ImportMemoryRequest]) -> pb.ImportMemoryRequest.Header:
    """The first message, checked."""
    async for message in messages:
        if message.WhichOneof("message") != "header":
            raise errors.stream_protocol("the header comes first and once")
        header = message.header
        if header.memory_id:
            names.check_id("header.memory_id", header.memory_id)
        validation.check_display_name("header.display_name", header.display_name)
        validation.check_request_id(header.request_id, "header.request_id")
        if header.offset < 0 or (header.offset and not header.request_id):
            raise errors.field_invalid("header.offset", "goes on with the import of a request_id")
        if header.signed_by and not _PUBLIC_KEY.fullmatch(header.signed_by):
            raise errors.field_invalid("header.signed_by", "must be 64 hex digits")
        return header
    raise errors.stream_protocol("the stream ended before its header")


async def _receive(messages: AsyncIterator[pb.ImportMemoryRequest], staged: Staged) -> None:
    """Writes the data messages to the file."""
    incoming = Incoming(staged)
    try:
        async for message in messages:
            if message.WhichOneof("message") != "data":
                raise errors.stream_protocol("after the header comes data alone")
            if len(message.data) > _MAX_DATA_BYTES:
                raise errors.field_invalid("data", f"must be at most {_MAX_DATA_BYTES} bytes")
            await incoming.write(message.data)
    finally:
        incoming.finish()


def _empty_row(tenant_uid: str, header: pb.ImportMemoryRequest.Header) -> MemoryRow:
    """The memory before the archive has told about it."""
    now_us = time.time_ns() // 1000
    return MemoryRow(
        uid=secrets.token_hex(16),
        tenant_uid=tenant_uid,
        memory_id=header.memory_id or names.new_memory_id(),
        display_name=header.display_name,
        labels={},
        packing=policy(PackingMode.TURN, 0, 0),
        state=MemoryState.IMPORTING,
        revision=0,
        last_number=0,
        deletion_epoch=0,
        document_count=0,
        text_bytes=0,
        created_us=now_us,
        updated_us=now_us,
        version=1,
    )


def _refused(error: ArchiveError) -> ApiError:
    """What is wrong with an archive. Its own words name members, never contents."""
    match error:
        case ArchiveVersionError():
            return ApiError(
                ErrorReason.ARCHIVE_VERSION_UNSUPPORTED,
                "the archive was written by a newer program",
                version=error.version,
                supported=VERSION,
            )
        case ArchiveTruncatedError():
            return ApiError(ErrorReason.ARCHIVE_TRUNCATED, str(error))
        case ArchiveSignatureError():
            return ApiError(ErrorReason.ARCHIVE_SIGNATURE_INVALID, str(error))
        case ArchiveForbiddenError():
            return ApiError(ErrorReason.ARCHIVE_FORBIDDEN, str(error))
        case ArchiveCorruptError() | ArchiveError():
            return ApiError(ErrorReason.ARCHIVE_CORRUPT, str(error))


def _offset_not_available(field: str, available: int) -> ApiError:
    """A transfer cannot go on there. available: where it can; 0: at its start alone."""
    return ApiError(
        ErrorReason.OFFSET_NOT_AVAILABLE,
        f"the transfer can go on at byte {available}",
        field=field,
        available=available,
    )
