"""Documents of one memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from memsvc.client import convert
from memsvc.client.names import document_name, new_request_id
from memsvc.client.timeouts import CALL_S
from memsvc.client.transport import Transport
from memsvc.client.types import Document, Filter, Page
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1 import resources_pb2 as wire
from memsvc.v1.memory_service_pb2_grpc import MemoryServiceStub

if TYPE_CHECKING:
    from memsvc.v1.memory_service_pb2_grpc import MemoryServiceAsyncStub


class AsyncDocuments:
    """What is in a memory. A document is named by its number or its whole name."""

    def __init__(self, transport: Transport, memory: str) -> None:
        self._transport = transport
        self._stub: MemoryServiceAsyncStub = MemoryServiceStub(transport.channel)
        self._memory = memory

    async def get(self, document: int | str, *, timeout_s: float | None = CALL_S) -> Document:
        """The document with its source. Raises NotFoundError."""
        name = document_name(self._memory, document)
        request = service.GetDocumentRequest(name=name, view=wire.FULL)
        call = self._stub.GetDocument
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return convert.document(reply)

    async def list(
        self,
        *,
        page_size: int = 0,
        page_token: str = "",
        full: bool = False,
        as_of: int | datetime | None = None,
        only: Filter | None = None,
        timeout_s: float | None = CALL_S,
    ) -> Page[Document]:
        """One page by ascending number; full brings the sources along.

        as_of: the memory as it was, at a revision or a time; the same for every page.
        only: those that match; a page may then be empty and not the last.
        """
        request = service.ListDocumentsRequest(
            parent=self._memory,
            page_size=page_size,
            page_token=page_token,
            view=wire.FULL if full else wire.BASIC,
            filter=convert.filter_to_wire(only),
        )
        convert.as_of(request, as_of)
        call = self._stub.ListDocuments
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(tuple(convert.document(d) for d in reply.documents), reply.next_page_token)

    async def iterate(
        self,
        *,
        page_size: int = 0,
        full: bool = False,
        as_of: int | datetime | None = None,
        only: Filter | None = None,
    ) -> AsyncGenerator[Document, None]:
        """All documents by ascending number, page by page as they are asked for."""
        page = await self.list(page_size=page_size, full=full, as_of=as_of, only=only)
        while True:
            for document in page.items:
                yield document
            if not page.next_page_token:
                return
            page = await self.list(
                page_size=page_size,
                page_token=page.next_page_token,
                full=full,
                as_of=as_of,
                only=only,
            )

    async def delete(
        self,
        documents: Iterable[int | str],
        *,
        request_id: str = "",
        timeout_s: float | None = CALL_S,
    ) -> int:
        """Deletes all those named, or none. Returns the revision this made."""
        request = service.DeleteDocumentsRequest(
            parent=self._memory,
            names=[document_name(self._memory, document) for document in documents],
            request_id=request_id or new_request_id(),
        )
        call = self._stub.DeleteDocuments
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return reply.revision
