"""AppendTurns, reading and deleting documents, ListRevisions. PutDocuments is in put.py."""

from __future__ import annotations

from collections.abc import Sequence

from memsvc import errors, names, validation
from memsvc.api.fingerprint import message_fingerprint
from memsvc.api.memories import find_active_memory, write_request
from memsvc.api.sources import matching, read_sources
from memsvc.application import Application
from memsvc.convert import document_to_wire, revision_to_wire, turns_from_wire
from memsvc.filters import requested_filter
from memsvc.packing import pack
from memsvc.paging import fitting
from memsvc.past import as_of, check_as_of
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2
from memsvc.writes import Written
from storage.catalog import DocumentRow, MemoryRow, NotFoundError


class DocumentsHandler:
    """What is in a memory."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self._catalog = application.catalog

    async def append_turns(self, request: pb.AppendTurnsRequest) -> pb.AppendTurnsResponse:
        """Durable before the reply."""
        memory_id = names.parse_memory("memory", request.memory)
        request_id = validation.check_request_id(request.request_id)
        turns = turns_from_wire(request.turns)
        call = await write_request(
            self._app,
            "memory",
            request.memory,
            method="AppendTurns",
            request_id=request_id,
            fingerprint=message_fingerprint(request) if request_id else b"",
        )
        text_bytes = sum(len(turn.text.encode()) for turn in turns)

        def reply(written: Written) -> bytes:
            return pb.AppendTurnsResponse(
                revision=written.revision,
                documents=[names.document_name(memory_id, n) for n in written.numbers],
            ).SerializeToString()

        answer = await self._app.writes.append(
            call,
            memory_id,
            lambda row: pack(turns, row.packing),
            reply,
            admit=lambda: self._app.encoding.check_backpressure(
                call.tenant_uid, text_bytes, len(turns)
            ),
        )
        return pb.AppendTurnsResponse.FromString(answer)

    async def list_documents(self, request: pb.ListDocumentsRequest) -> pb.ListDocumentsResponse:
        """By ascending number. A page may be shorter than asked, for its bytes."""
        view = checked_view(request.view, resources_pb2.BASIC)
        full = view == resources_pb2.FULL
        limit = validation.check_page_size(
            request.page_size, validation.MAX_FULL_PAGE if full else validation.MAX_PAGE
        )
        check_as_of(request)
        wanted = requested_filter(request)
        memory = await find_active_memory(self._app, "parent", request.parent)
        memory = await as_of(self._app, memory, request)
        when = f"{request.at_revision} {request.at_time.ToMicroseconds()}"
        binding: tuple[str, ...] = (memory.tenant_uid, "ListDocuments", memory.uid, when)
        if wanted is not None:
            binding += (request.filter.SerializeToString(deterministic=True).hex(),)
        position = self._app.page_tokens.open(binding, request.page_token)
        after = int(position[0]) if position else 0
        documents: Sequence[resources_pb2.Document | None]
        if wanted is not None:
            documents, more = await matching(
                self._app, memory, wanted, after=after, limit=limit, full=full
            )
        else:
            rows, more = await self._catalog.list_documents(
                memory.uid, limit, after, memory.last_number
            )
            if not full:
                documents = [document_to_wire(memory.memory_id, row, None) for row in rows]
            else:
                documents = await self._filled(memory, rows)
                more = more if len(documents) == len(rows) else rows[len(documents) - 1].number
        return pb.ListDocumentsResponse(
            documents=[document for document in documents if document is not None],
            next_page_token=self._app.page_tokens.issue(binding, [more]) if more else "",
        )

    async def list_revisions(self, request: pb.ListRevisionsRequest) -> pb.ListRevisionsResponse:
        """Newest first."""
        limit = validation.check_page_size(request.page_size)
        memory = await find_active_memory(self._app, "parent", request.parent)
        binding = (memory.tenant_uid, "ListRevisions", memory.uid)
        position = self._app.page_tokens.open(binding, request.page_token)
        before = int(position[0]) if position else None
        rows, more = await self._catalog.list_revisions(memory.uid, limit, before)
        return pb.ListRevisionsResponse(
            revisions=[revision_to_wire(row) for row in rows],
            next_page_token=self._app.page_tokens.issue(binding, [more]) if more else "",
        )

    async def get_document(self, request: pb.GetDocumentRequest) -> resources_pb2.Document:
        """One document."""
        view = checked_view(request.view, resources_pb2.FULL)
        memory_id, number = names.parse_document("name", request.name)
        memory = await find_active_memory(self._app, "name", names.memory_name(memory_id))
        try:
            row = await self._catalog.get_document(memory.uid, number)
        except NotFoundError as error:
            raise errors.document_not_found() from error
        source = None
        if view == resources_pb2.FULL:
            (source,) = await read_sources(self._app, memory, [number])
            if source is None:
                raise errors.document_not_found()
        return document_to_wire(memory_id, row, source)

    async def delete_documents(
        self, request: pb.DeleteDocumentsRequest
    ) -> pb.DeleteDocumentsResponse:
        """All those named, or none."""
        memory_id = names.parse_memory("parent", request.parent)
        request_id = validation.check_request_id(request.request_id)
        numbers = _numbers(memory_id, request.names)
        call = await write_request(
            self._app,
            "parent",
            request.parent,
            method="DeleteDocuments",
            request_id=request_id,
            fingerprint=message_fingerprint(request),
        )
        answer = await self._app.writes.delete_documents(
            call,
            memory_id,
            numbers,
            lambda revision: pb.DeleteDocumentsResponse(revision=revision).SerializeToString(),
        )
        return pb.DeleteDocumentsResponse.FromString(answer)

    async def _filled(
        self, memory: MemoryRow, rows: Sequence[DocumentRow]
    ) -> list[resources_pb2.Document | None]:
        """Full documents for the first rows, as many as one page takes, at least one.

        None stands for a document that was deleted meanwhile.
        """
        rows = rows[: fitting(row.text_bytes for row in rows)]
        sources = await read_sources(self._app, memory, [row.number for row in rows])
        documents = [
            document_to_wire(memory.memory_id, row, source) if source else None
            for row, source in zip(rows, sources, strict=True)
        ]
        return documents[: fitting(d.ByteSize() if d else 0 for d in documents)]


def checked_view(
    view: resources_pb2.DocumentView.ValueType, default: resources_pb2.DocumentView.ValueType
) -> resources_pb2.DocumentView.ValueType:
    """The view to use. Raises FIELD_INVALID."""
    if view not in resources_pb2.DocumentView.values():
        raise errors.field_invalid("view", "is not a view")
    return view or default


def _numbers(memory_id: str, document_names: Sequence[str]) -> list[int]:
    """Numbers of documents of one memory, each once."""
    validation.check_count("names", len(document_names), low=1, high=validation.MAX_DELETE_NAMES)
    numbers: dict[int, None] = {}
    for index, name in enumerate(document_names):
        field = f"names[{index}]"
        parent, number = names.parse_document(field, name)
        if parent != memory_id:
            raise errors.field_invalid(field, "is not a document of parent")
        if number in numbers:
            raise errors.field_invalid(field, "names a document a second time")
        numbers[number] = None
    return list(numbers)
