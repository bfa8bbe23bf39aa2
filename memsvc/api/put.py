"""PutDocuments: large texts as a stream, all of them written or none.

A client that goes away looks at first like one that has finished, so a stream says
by its last message that it is whole.

Texts are held in memory until the stream ends, so they count against one budget
of the whole server while they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Self

from memsvc import errors, names, validation
from memsvc.api.fingerprint import StreamFingerprint
from memsvc.api.memories import write_request
from memsvc.application import Application
from memsvc.convert import optional_time
from memsvc.limits import FairPool
from memsvc.principal import current_principal
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import Written
from storage.documents import TextSource


class ByteBudget:
    """Bytes that all streams of the server together may hold; no tenant takes all of it."""

    def __init__(self, limit: int) -> None:
        self._pool = FairPool(limit)

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._pool.held

    def share(self, tenant_uid: str = "") -> BudgetShare:
        """What one stream holds, given back at the end of its with block."""
        return BudgetShare(self._pool, tenant_uid)


class BudgetShare:
    """One stream's part of a budget."""

    def __init__(self, pool: FairPool, tenant_uid: str) -> None:
        self._pool = pool
        self._tenant_uid = tenant_uid
        self.held = 0

    def take(self, size: int) -> None:
        """Raises OVERLOADED when the budget, or the tenant's part of it, is spent."""
        self._pool.take(self._tenant_uid, size)
        self.held += size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.held:
            self._pool.give(self._tenant_uid, self.held)
        self.held = 0


@dataclass
class _Text:
    """A document whose pieces are coming in."""

    path: str
    title: str
    occurred_at: datetime | None
    metadata: dict[str, str]
    pieces: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, piece: str) -> int:
        """Returns the piece's bytes of UTF-8."""
        size = len(piece.encode())
        if self.size + size > validation.MAX_DOCUMENT_TEXT:
            raise errors.text_too_long(
                f"{self.path}.text", limit=validation.MAX_DOCUMENT_TEXT, actual=self.size + size
            )
        validation.check_clean(f"{self.path}.text", piece)
        self.pieces.append(piece)
        self.size += size
        return size

    def source(self) -> TextSource:
        """The finished document."""
        if not self.size:
            raise errors.field_required(f"{self.path}.text")
        return TextSource("".join(self.pieces), self.title, self.occurred_at, self.metadata)


class _Collector:
    """The state of one stream: header, then documents, each a start and its pieces."""

    def __init__(self, share: BudgetShare) -> None:
        self.header: pb.PutDocumentsRequest.Header | None = None
        self.sources: list[TextSource] = []
        self.text_bytes = 0
        self._share = share
        self._text: _Text | None = None
        self._ended = False
        self._fingerprint = StreamFingerprint()

    def take(self, message: pb.PutDocumentsRequest) -> None:
        """Raises STREAM_PROTOCOL and every limit as soon as it is passed."""
        kind = message.WhichOneof("message")
        if kind is None:
            raise errors.stream_protocol("a message holds neither header, start, text nor end")
        if self._ended:
            raise errors.stream_protocol("nothing comes after the end")
        if (kind == "header") != (self.header is None):
            raise errors.stream_protocol("the header comes first and once")
        if kind == "header":
            self._take_header(message.header)
        elif kind == "document_start":
            self._take_start(message.document_start)
        elif kind == "text":
            self._take_text(message.text)
        else:
            self._take_end(message.end)

    def finish(self) -> bytes:
        """Returns the fingerprint of the payload."""
        if not self._ended:
            raise errors.stream_protocol("the stream stopped before its end message")
        return self._fingerprint.digest()

    def _take_header(self, header: pb.PutDocumentsRequest.Header) -> None:
        names.parse_memory("header.memory", header.memory)
        validation.check_request_id(header.request_id, "header.request_id")
        self._fingerprint.add(header.memory.encode())
        self.header = header

    def _take_start(self, start: pb.PutDocumentsRequest.DocumentStart) -> None:
        self._end_text()
        if len(self.sources) >= validation.MAX_PUT_DOCUMENTS:
            limit = validation.MAX_PUT_DOCUMENTS
            raise errors.too_many_items("documents", limit=limit, actual=limit + 1)
        path = f"documents[{len(self.sources)}]"
        self._text = _Text(
            path=path,
            title=validation.check_string(f"{path}.title", start.title, validation.MAX_TITLE),
            occurred_at=optional_time(f"{path}.occurred_at", start),
            metadata=validation.check_metadata(f"{path}.metadata", start.metadata),
        )
        self._share.take(start.ByteSize())
        self._fingerprint.add(start.SerializeToString(deterministic=True))

    def _take_text(self, piece: str) -> None:
        if self._text is None:
            raise errors.stream_protocol("text comes after a document_start")
        size = self._text.add(piece)
        self.text_bytes += size
        if self.text_bytes > validation.MAX_PUT_BYTES:
            raise errors.text_too_long(
                "documents", limit=validation.MAX_PUT_BYTES, actual=self.text_bytes
            )
        self._share.take(size)

    def _take_end(self, end: pb.PutDocumentsRequest.End) -> None:
        self._end_text()
        if not self.sources:
            raise errors.field_required("documents")
        if end.documents != len(self.sources):
            raise errors.field_invalid("end.documents", f"{len(self.sources)} documents came")
        self._ended = True

    def _end_text(self) -> None:
        if self._text is None:
            return
        source = self._text.source()
        self._fingerprint.add(source.text.encode())
        self.sources.append(source)
        self._text = None


class PutHandler:
    """Adds texts, each its own document."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self.budget = ByteBudget(application.config.put_budget)

    async def put_documents(
        self, messages: AsyncIterator[pb.PutDocumentsRequest]
    ) -> pb.PutDocumentsResponse:
        """Nothing is visible unless the whole stream is."""
        with self.budget.share(current_principal().tenant_uid) as share:
            collector = _Collector(share)
            async for message in messages:
                collector.take(message)
            fingerprint = collector.finish()
            assert collector.header is not None
            return await self._write(collector.header, collector, fingerprint)

    async def _write(
        self, header: pb.PutDocumentsRequest.Header, collected: _Collector, fingerprint: bytes
    ) -> pb.PutDocumentsResponse:
        memory_id = names.parse_memory("header.memory", header.memory)
        call = await write_request(
            self._app,
            "header.memory",
            header.memory,
            method="PutDocuments",
            request_id=header.request_id,
            fingerprint=fingerprint,
        )
        # Looked up first, since writing all of it to find out would cost more.
        before = await self._app.writes.first_reply(call)
        if before is not None:
            return pb.PutDocumentsResponse.FromString(before)

        def reply(written: Written) -> bytes:
            return pb.PutDocumentsResponse(
                revision=written.revision,
                documents=[names.document_name(memory_id, n) for n in written.numbers],
            ).SerializeToString()

        answer = await self._app.writes.append(
            call,
            memory_id,
            lambda _: collected.sources,
            reply,
            admit=lambda: self._app.encoding.check_backpressure(
                call.tenant_uid, collected.text_bytes, len(collected.sources)
            ),
        )
        return pb.PutDocumentsResponse.FromString(answer)
