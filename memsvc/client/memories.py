"""The tenant's memories: create, look up, change, delete, import."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from memsvc.client import convert
from memsvc.client.archives import Source, Upload
from memsvc.client.names import memory_name, new_request_id
from memsvc.client.timeouts import CALL_S, TRANSFER_S
from memsvc.client.transport import Transport
from memsvc.client.types import Imported, Memory, Packing, Page
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1 import resources_pb2 as wire
from memsvc.v1.memory_service_pb2_grpc import MemoryServiceStub

if TYPE_CHECKING:
    from memsvc.v1.memory_service_pb2_grpc import MemoryServiceAsyncStub


class AsyncMemories:
    """The tenant's memories."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub: MemoryServiceAsyncStub = MemoryServiceStub(transport.channel)

    async def create(
        self,
        memory_id: str = "",
        *,
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        packing: Packing | None = None,
        request_id: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Memory:
        """Makes an empty memory; without an id the server chooses one."""
        request = service.CreateMemoryRequest(
            memory=wire.Memory(
                display_name=display_name,
                labels=labels or {},
                packing=convert.packing_to_wire(packing),
            ),
            memory_id=memory_id,
            request_id=request_id or new_request_id(),
        )
        call = self._stub.CreateMemory
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return convert.memory(reply)

    async def get(self, memory: str, *, timeout_s: float | None = CALL_S) -> Memory:
        """The memory as it is now. Raises NotFoundError."""
        request = service.GetMemoryRequest(name=memory_name(memory))
        call = self._stub.GetMemory
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return convert.memory(reply)

    async def list(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = CALL_S
    ) -> Page[Memory]:
        """One page, newest first."""
        request = service.ListMemoriesRequest(page_size=page_size, page_token=page_token)
        call = self._stub.ListMemories
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(tuple(convert.memory(m) for m in reply.memories), reply.next_page_token)

    async def iterate(self, *, page_size: int = 0) -> AsyncGenerator[Memory, None]:
        """All memories, newest first, page by page as they are asked for."""
        page = await self.list(page_size=page_size)
        while True:
            for memory in page.items:
                yield memory
            if not page.next_page_token:
                return
            page = await self.list(page_size=page_size, page_token=page.next_page_token)

    async def update(
        self,
        memory: str,
        *,
        display_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Memory:
        """Changes what is given; labels are replaced as a whole.

        With an etag the call is not retried: the first attempt may have changed it.
        """
        paths = [
            path
            for path, value in (("display_name", display_name), ("labels", labels))
            if value is not None
        ]
        request = service.UpdateMemoryRequest(
            memory=wire.Memory(
                name=memory_name(memory),
                display_name=display_name or "",
                labels=labels or {},
                etag=etag,
            ),
            update_mask=FieldMask(paths=paths),
        )
        call = self._stub.UpdateMemory
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=not etag)
        return convert.memory(reply)

    async def delete(
        self,
        memory: str,
        *,
        etag: str = "",
        allow_missing: bool = False,
        timeout_s: float | None = CALL_S,
    ) -> None:
        """Deletes the memory and all in it; after that nothing can read it.

        Retried only with allow_missing: otherwise the second attempt could
        report as missing what the first one deleted.
        """
        request = service.DeleteMemoryRequest(
            name=memory_name(memory), etag=etag, allow_missing=allow_missing
        )
        call = self._stub.DeleteMemory
        await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=allow_missing)

    async def import_archive(
        self,
        source: Path | bytes,
        *,
        memory_id: str = "",
        display_name: str = "",
        passphrase: str | None = None,
        signed_by: str = "",
        request_id: str = "",
        on_sent: Callable[[int], object] | None = None,
        timeout_s: float | None = TRANSFER_S,
    ) -> Imported:
        """Makes a new memory from an archive, given as a file or as bytes.

        A lost connection is taken up behind what the server received; with a request_id of
        the caller's, also by another process. on_sent is told the bytes handed over so far,
        which may go back. passphrase: of an archive that is encrypted by one; it stays here.
        signed_by: public key, 64 hex digits, that must have signed the archive. Raises
        PassphraseError and SealedArchiveError, the latter also when damage is met on the way;
        then there is no new memory.
        """
        header = service.ImportMemoryRequest.Header(
            memory_id=memory_id,
            display_name=display_name,
            signed_by=signed_by,
            request_id=request_id or new_request_id(),
        )

        archive = Source(source, passphrase)
        try:
            await archive.open()
            upload = Upload(header, archive, on_sent, resume=bool(request_id))
            reply = await upload.run(self._transport, self._stub, timeout_s)
        finally:
            archive.close()
        memory = convert.memory(reply.memory)
        return Imported(memory, reply.reused_blocks, reply.documents_to_encode)
