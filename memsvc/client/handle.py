"""One memory at hand: append, ask, watch, export."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from memsvc.client import convert
from memsvc.client.archives import Target, download, download_to
from memsvc.client.batching import TurnBatch
from memsvc.client.documents import AsyncDocuments
from memsvc.client.dumps import Dump
from memsvc.client.errors import StreamBrokenError
from memsvc.client.names import memory_name, model_name, new_request_id
from memsvc.client.timeouts import ANSWER_S, CALL_S, TRANSFER_S
from memsvc.client.transport import Transport
from memsvc.client.types import (
    Answer,
    ArchivePart,
    Citation,
    Done,
    Filter,
    Forked,
    Generation,
    Page,
    Progress,
    QueryEvent,
    Restored,
    Retrieved,
    Revision,
    Routing,
    TextDelta,
    TextSource,
    Turn,
    Usage,
    Written,
)
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1 import resources_pb2 as wire
from memsvc.v1.memory_service_pb2_grpc import MemoryServiceStub

if TYPE_CHECKING:
    from memsvc.v1.memory_service_pb2_grpc import MemoryServiceAsyncStub

_TEXT_PIECE_CHARACTERS = 256 << 10


class AsyncMemoryHandle:
    """One memory by name. Making a handle calls nothing."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._transport = transport
        self._stub: MemoryServiceAsyncStub = MemoryServiceStub(transport.channel)
        self._name = memory_name(name)
        self._documents = AsyncDocuments(transport, self._name)

    @property
    def name(self) -> str:
        """ "memories/{memory}"."""
        return self._name

    @property
    def id(self) -> str:
        """Last part of the name."""
        return self._name.rpartition("/")[2]

    @property
    def documents(self) -> AsyncDocuments:
        """What is in the memory."""
        return self._documents

    async def append(
        self,
        turns: Iterable[Turn],
        *,
        request_id: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Written:
        """Appends turns in order. When it returns they are on the server's disk."""
        request = service.AppendTurnsRequest(
            memory=self._name,
            turns=[convert.turn_to_wire(turn) for turn in turns],
            request_id=request_id or new_request_id(),
        )
        call = self._stub.AppendTurns
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Written(reply.revision, tuple(reply.documents))

    async def put(
        self,
        documents: Iterable[TextSource],
        *,
        request_id: str = "",
        timeout_s: float | None = TRANSFER_S,
    ) -> Written:
        """Adds texts, each its own document: all of them, or none."""
        texts = tuple(documents)
        header = service.PutDocumentsRequest.Header(
            memory=self._name, request_id=request_id or new_request_id()
        )

        async def requests() -> AsyncIterator[service.PutDocumentsRequest]:
            yield service.PutDocumentsRequest(header=header)
            for source in texts:
                yield service.PutDocumentsRequest(document_start=convert.text_start(source))
                for start in range(0, len(source.text), _TEXT_PIECE_CHARACTERS):
                    piece = source.text[start : start + _TEXT_PIECE_CHARACTERS]
                    yield service.PutDocumentsRequest(text=piece)
            end = service.PutDocumentsRequest.End(documents=len(texts))
            yield service.PutDocumentsRequest(end=end)

        call = self._stub.PutDocuments
        reply = await self._transport.upload(call, requests, timeout_s=timeout_s, repeatable=True)
        return Written(reply.revision, tuple(reply.documents))

    async def add_dump(
        self,
        dump: Dump,
        *,
        on_added: Callable[[int], object] | None = None,
        timeout_s: float | None = TRANSFER_S,
    ) -> Written:
        """Appends another service's conversations and adds its texts, in as many calls as it takes.

        Calling it again with the same dump goes on where it failed: request ids are made of
        the dump's content and the memory's uid, and the server remembers them for a day.
        on_added is told turns and texts so far. timeout_s: of each call. Returns all documents
        and the last revision.
        """
        request = service.GetMemoryRequest(name=self._name)
        memory = await self._transport.unary(
            self._stub.GetMemory, request, timeout_s=CALL_S, repeatable=True
        )
        documents: list[str] = []
        revision = added = 0
        for number, batch in enumerate(dump.batches()):
            request_id = dump.request_id(memory.uid, number)
            if isinstance(batch, TurnBatch):
                written = await self.append(batch.items, request_id=request_id, timeout_s=timeout_s)
            else:
                written = await self.put(batch.items, request_id=request_id, timeout_s=timeout_s)
            added += len(batch.items)
            documents += written.documents
            revision = written.revision
            if on_added is not None:
                on_added(added)
        return Written(revision, tuple(documents))

    async def query(
        self,
        question: str,
        *,
        model: str = "",
        at_least_revision: int = 0,
        as_of: int | datetime | None = None,
        only: Filter | None = None,
        options: Generation | None = None,
        timeout_s: float | None = ANSWER_S,
    ) -> AsyncGenerator[QueryEvent, None]:
        """The events of an answer as they come; the last one is Done.

        as_of: answers from the memory as it was, at a revision or a time.
        only: as if it held the documents alone that match.

        Leaving the iteration stops the work. Never retried once an event came.
        Raises StreamBrokenError when the stream ends without Done.
        """
        request = service.QueryRequest(
            memory=self._name,
            question=question,
            model=model_name(model),
            at_least_revision=at_least_revision,
            options=convert.generation_to_wire(options),
            filter=convert.filter_to_wire(only),
        )
        convert.as_of(request, as_of)
        finished = False
        stream = self._transport.stream(self._stub.Query, request, timeout_s=timeout_s)
        try:
            async for message in stream:
                event = convert.query_event(message)
                if event is not None:
                    finished = isinstance(event, Done)
                    yield event
        finally:
            await stream.aclose()
        if not finished:
            raise StreamBrokenError("The answer ended without its last event.")

    async def ask(
        self,
        question: str,
        *,
        model: str = "",
        at_least_revision: int = 0,
        as_of: int | datetime | None = None,
        only: Filter | None = None,
        options: Generation | None = None,
        timeout_s: float | None = ANSWER_S,
    ) -> Answer:
        """As query, gathered into one Answer."""
        events = [
            event
            async for event in self.query(
                question,
                model=model,
                at_least_revision=at_least_revision,
                as_of=as_of,
                only=only,
                options=options,
                timeout_s=timeout_s,
            )
        ]
        return Answer(
            text="".join(e.text for e in events if isinstance(e, TextDelta)),
            citations=tuple(e for e in events if isinstance(e, Citation)),
            routing=tuple(e for e in events if isinstance(e, Routing)),
            usage=next((e for e in events if isinstance(e, Usage)), None),
            done=next(e for e in events if isinstance(e, Done)),
        )

    async def retrieve(
        self,
        question: str,
        *,
        limit: int = 0,
        model: str = "",
        at_least_revision: int = 0,
        as_of: int | datetime | None = None,
        only: Filter | None = None,
        full: bool = True,
        lexical_weight: float | None = None,
        prefer_latest: bool = False,
        timeout_s: float | None = ANSWER_S,
    ) -> Retrieved:
        """Ranks documents for a question; generates nothing.

        lexical_weight, prefer_latest: as in Generation.
        """
        request = service.RetrieveRequest(
            memory=self._name,
            question=question,
            model=model_name(model),
            at_least_revision=at_least_revision,
            limit=limit,
            view=wire.FULL if full else wire.BASIC,
            lexical_weight=lexical_weight,
            prefer_latest=prefer_latest,
            filter=convert.filter_to_wire(only),
        )
        convert.as_of(request, as_of)
        call = self._stub.Retrieve
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        documents = tuple(convert.ranked(d) for d in reply.documents)
        return Retrieved(documents, reply.revision, reply.model, reply.lexical_weight)

    async def revisions(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = CALL_S
    ) -> Page[Revision]:
        """What each write made, newest first; one page."""
        request = service.ListRevisionsRequest(
            parent=self._name, page_size=page_size, page_token=page_token
        )
        call = self._stub.ListRevisions
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(tuple(convert.revision(r) for r in reply.revisions), reply.next_page_token)

    async def fork(
        self,
        memory_id: str = "",
        *,
        display_name: str = "",
        as_of: int | datetime | None = None,
        request_id: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Forked:
        """Makes a new memory that shares what this one holds, or held as of a revision or time."""
        request = service.ForkMemoryRequest(
            name=self._name,
            memory_id=memory_id,
            display_name=display_name,
            request_id=request_id or new_request_id(),
        )
        convert.as_of(request, as_of)
        call = self._stub.ForkMemory
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Forked(convert.memory(reply.memory), reply.documents_missing)

    async def restore(
        self, revision: int, *, request_id: str = "", timeout_s: float | None = CALL_S
    ) -> Restored:
        """Deletes what was added after that revision, by a new one. Fork first to keep it."""
        request = service.RestoreMemoryRequest(
            name=self._name, revision=revision, request_id=request_id or new_request_id()
        )
        call = self._stub.RestoreMemory
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Restored(reply.revision, reply.documents_removed, reply.documents_missing)

    async def watch(self, *, timeout_s: float | None = None) -> AsyncGenerator[Progress, None]:
        """The memory's progress at once and at each change, until it is deleted.

        A lost connection is taken up again: each first message tells all.
        """
        request = service.WatchMemoryRequest(name=self._name)
        stream = self._transport.stream(
            self._stub.WatchMemory, request, timeout_s=timeout_s, again=lambda: request
        )
        try:
            async for message in stream:
                yield convert.progress(message)
        finally:
            await stream.aclose()

    async def export(
        self,
        *,
        without_blocks: bool = False,
        signed: bool = False,
        request_id: str = "",
        offset: int = 0,
        timeout_s: float | None = TRANSFER_S,
    ) -> AsyncGenerator[ArchivePart, None]:
        """The archive in pieces; total_bytes is the same in each.

        A lost connection is taken up where it broke. signed: by the server's key. offset:
        bytes that are here of an export with the same request_id, by another process say.
        Raises OffsetNotAvailableError when the server keeps it no longer.
        """
        request = self._export_request(without_blocks, signed, request_id)
        request.offset = offset
        parts = download(self._transport, self._stub, request, timeout_s)
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    def _export_request(
        self, without_blocks: bool, signed: bool, request_id: str
    ) -> service.ExportMemoryRequest:
        return service.ExportMemoryRequest(
            name=self._name,
            without_blocks=without_blocks,
            signed=signed,
            request_id=request_id or new_request_id(),
        )

    async def export_to(
        self,
        path: Path,
        *,
        without_blocks: bool = False,
        signed: bool = False,
        passphrase: str | None = None,
        request_id: str = "",
        on_received: Callable[[int, int], object] | None = None,
        timeout_s: float | None = TRANSFER_S,
    ) -> int:
        """Writes the archive to a file, which appears only when it is whole. Returns bytes.

        When this fails with a request_id of the caller's, what came stays in a file beside
        the target, and the same call goes on with it; without one nothing stays.
        on_received is told the bytes that are here, and of how many. passphrase: the file is
        encrypted by it, here; such a file is not gone on with by another process.
        """
        request = self._export_request(without_blocks, signed, request_id)
        staged = path.with_name(f".{path.name}.{request.request_id}")
        try:
            with await asyncio.to_thread(staged.open, "a+b") as file:
                target = await asyncio.to_thread(Target, file, passphrase)
                written = await download_to(
                    self._transport,
                    self._stub,
                    request,
                    target,
                    on_received=on_received,
                    timeout_s=timeout_s,
                )
            await asyncio.to_thread(staged.replace, path)
        finally:
            if not request_id:
                await asyncio.to_thread(staged.unlink, missing_ok=True)
        return written
