"""What Query and Retrieve share: which memory, as of when, under which model, by when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpc import aio

from memsvc import errors, names, validation
from memsvc.api.memories import find_active_memory
from memsvc.api.sources import read_sources
from memsvc.api_error import ApiError
from memsvc.application import Application
from memsvc.convert import document_to_wire
from memsvc.filters import requested_filter
from memsvc.past import as_of, check_as_of
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.workers import Endpoint, ServedModel
from memsvc.writes import memory_uid
from model_adapter.v1 import model_adapter_pb2 as worker_pb
from storage.catalog import MemoryRow, ModelRow, NotFoundError
from storage.filters import DocumentFilter

T = TypeVar("T")

Context = aio.ServicerContext[Any, Any]

#: A typed error must leave before the client's own deadline cuts the call.
_MARGIN_SHARE, _MAX_MARGIN_S = 0.2, 0.5
#: Tries of a call to the worker before anything was streamed.
_TRIES = 3
_PAUSE_S = 0.1
#: A row read this long ago need not be read again: the question came before the deletion.
_FRESH_S = 0.02

_CHANGED = (ErrorReason.MODEL_MISMATCH,)
_AGAIN = (ErrorReason.WORKER_UNAVAILABLE, ErrorReason.MODEL_MISMATCH, ErrorReason.RECORD_CORRUPT)


@dataclass(frozen=True)
class Deadline:
    """answer_by: time.monotonic() at which waiting ends. hard: of the whole call, or None."""

    answer_by: float
    hard: float | None

    @classmethod
    def of(cls, context: Context, otherwise_s: float) -> Deadline:
        """From what the client set; without that, waiting alone is bounded."""
        now, left_s = time.monotonic(), context.time_remaining()
        if left_s is None:
            return cls(now + otherwise_s, None)
        return cls(now + left_s - min(left_s * _MARGIN_SHARE, _MAX_MARGIN_S), now + left_s)

    @property
    def wait_s(self) -> float:
        """Seconds that may still be spent waiting."""
        return max(0.0, self.answer_by - time.monotonic())

    @property
    def left_s(self) -> float | None:
        """Seconds the worker has; None for no limit."""
        return None if self.hard is None else max(0.001, self.hard - time.monotonic())


@dataclass(frozen=True)
class Asked:
    """One question's view: the memory as it was when the call arrived, or as asked for.

    wanted: the documents that may be chosen; None for all.
    """

    memory: MemoryRow
    deadline: Deadline
    model_id: str
    wanted: DocumentFilter | None = None
    arrived: float = field(default_factory=time.monotonic)

    @property
    def revision(self) -> int:
        """Revision that the answer sees."""
        return self.memory.revision


@dataclass(frozen=True)
class Snapshot:
    """What the worker is asked to look at, and the time.monotonic() as of which it is deleted."""

    served: ServedModel
    reference: worker_pb.MemoryRef
    seen: float

    @property
    def model(self) -> ModelRow:
        """The model that answers."""
        return self.served.row


async def ask(
    application: Application, request: pb.QueryRequest | pb.RetrieveRequest, context: Context
) -> Asked:
    """Checks what both requests have in common."""
    validation.check_question(request.question)
    model_id = names.parse_model("model", request.model) if request.model else ""
    if request.at_least_revision < 0:
        raise errors.field_invalid("at_least_revision", "must not be negative")
    check_as_of(request)
    wanted = requested_filter(request)
    memory = await find_active_memory(application, "memory", request.memory)
    if request.at_least_revision > memory.revision:
        raise errors.revision_not_reached(memory.revision)
    memory = await as_of(application, memory, request)
    if request.at_least_revision > memory.revision:
        raise errors.field_invalid("at_least_revision", "lies behind what is asked for")
    deadline = Deadline.of(context, application.config.query_wait_s)
    return Asked(memory, deadline, model_id, wanted)


async def prepare(
    application: Application, asked: Asked, failed: Collection[Endpoint] = ()
) -> Snapshot:
    """Waits until the revision is encoded and a worker is there. Raises ApiError.

    failed: workers that have just failed this call.
    """
    memory = asked.memory
    model = await _model(application, asked)
    served, current = await _ready(application, asked, model, failed)
    if served.row.identity != model.identity:
        raise ApiError(ErrorReason.MODEL_MISMATCH, "the model was changed meanwhile")
    if asked.wanted is not None and not served.endpoint.knows_filters:
        raise errors.filter_unsupported(model.model_id)
    secret = await application.keys.secret(memory.tenant_uid, memory_uid(memory))
    # Last: nothing is waited for between this and the call.
    seen = time.monotonic()
    removed = await application.deletions.owed.removed(memory)
    if removed and not served.endpoint.knows_removals:
        raise errors.worker_unavailable(model.model_id)
    return Snapshot(
        served,
        worker_pb.MemoryRef(
            tenant=memory.tenant_uid,
            memory_uid=memory.uid,
            # Of the revision asked; what was appended since may not be encoded.
            last_number=memory.last_number,
            # Of now, after waiting: what was deleted since is not to be seen.
            deletion_epoch=current.deletion_epoch,
            identity=model.identity,
            memory_key=bytes(secret.key) if secret else b"",
            key_generation=secret.generation if secret else 0,
            removed=_ranges(removed),
        ),
        seen,
    )


def _ranges(numbers: Iterable[int]) -> list[worker_pb.NumberRange]:
    """Of ascending numbers."""
    ranges: list[worker_pb.NumberRange] = []
    for number in numbers:
        if ranges and ranges[-1].last == number - 1:
            ranges[-1].last = number
        else:
            ranges.append(worker_pb.NumberRange(first=number, last=number))
    return ranges


async def _ready(
    application: Application, asked: Asked, model: ModelRow, failed: Collection[Endpoint]
) -> tuple[ServedModel, MemoryRow]:
    """A worker, and the memory's row as of a moment after which all that is asked about was
    encoded: blocks that are made again under a later deletion epoch are waited for, too.
    """
    current, deadline = asked.memory, asked.deadline
    while True:
        known = current
        await application.encoding.wait_encoded(known, model, asked.revision, deadline.answer_by)
        served = await application.workers.require(
            model.model_id, known.uid, deadline.wait_s, failed
        )
        if time.monotonic() - asked.arrived > _FRESH_S:
            current = await still_there(application, known)
        if current.deletion_epoch == known.deletion_epoch:
            return served, current


async def _model(application: Application, asked: Asked) -> ModelRow:
    """The model named, else the one that answers for the memory."""
    if asked.model_id:
        model = await application.workers.resolve(asked.model_id, asked.deadline.wait_s)
        await application.encoding.require_complete(asked.memory, model)
        return model
    answering = await _answering(application, asked)
    return await application.workers.resolve(answering, asked.deadline.wait_s)


async def _answering(application: Application, asked: Asked) -> str:
    """Id of the model that answers, or of the one due to take over where only that is served.

    Where neither is, a worker is awaited: it may come with another model.
    """
    workers, memory = application.workers, asked.memory
    with suppress(TimeoutError):
        async with asyncio.timeout(asked.deadline.wait_s):
            while True:
                seen = workers.generation
                for model_id in (memory.default_model_id, memory.next_model_id):
                    if model_id and workers.find(model_id) is not None:
                        return model_id
                await workers.changed(seen)
                memory = await still_there(application, memory)
    return memory.default_model_id


async def still_there(application: Application, memory: MemoryRow) -> MemoryRow:
    """The memory's row as it is now. Raises MEMORY_NOT_FOUND when it was deleted."""
    try:
        current = await application.catalog.get_memory(memory.tenant_uid, memory.memory_id)
    except NotFoundError as error:
        raise errors.memory_not_found("memory") from error
    if current.uid != memory.uid:
        raise errors.memory_not_found("memory")
    return current


async def answered(
    application: Application, asked: Asked, call: Callable[[Snapshot], Awaitable[T]]
) -> tuple[Snapshot, T]:
    """The worker's one answer, asked again where that helps."""

    async def once(snapshot: Snapshot) -> AsyncGenerator[T]:
        yield await call(snapshot)

    async with aclosing(streamed(application, asked, once)) as answers:
        async for answer in answers:
            return answer
    raise AssertionError("a call that neither answers nor fails")


async def streamed(
    application: Application, asked: Asked, call: Callable[[Snapshot], AsyncGenerator[T]]
) -> AsyncGenerator[tuple[Snapshot, T]]:
    """The worker's answers, each with the snapshot it belongs to.

    Until the first one came, a lost worker, one that serves another model now, or
    a damaged block (which is made again) leads to another try. An answer that may come from
    documents which were deleted under it ends as by their eviction.
    """
    failed: set[Endpoint] = set()
    for left in reversed(range(_TRIES)):
        began = False
        snapshot = None
        try:
            snapshot = await prepare(application, asked, failed)
            async with aclosing(call(snapshot)) as answers:
                async for answer in answers:
                    if application.deletions.owed.deleted_since(asked.memory.uid, snapshot.seen):
                        raise errors.worker_unavailable(snapshot.model.model_id)
                    began = True
                    yield snapshot, answer
            return
        except ApiError as error:
            if snapshot is not None:
                failed.add(snapshot.served.endpoint)
                await _learn(application, asked, snapshot, error)
            # Read anew: a call that names a deleted memory is not to be tried again.
            await still_there(application, asked.memory)
            # Without a snapshot, waiting is what failed, but for a model that was replaced.
            again = error.reason in _AGAIN if snapshot else error.reason in _CHANGED
            if began or not left or not again or asked.deadline.wait_s <= _PAUSE_S:
                raise
        await asyncio.sleep(_PAUSE_S)


async def _learn(
    application: Application, asked: Asked, snapshot: Snapshot, error: ApiError
) -> None:
    """What a failed call says about the worker or the blocks."""
    if error.reason in {ErrorReason.WORKER_UNAVAILABLE, ErrorReason.MODEL_MISMATCH}:
        snapshot.served.endpoint.suspect()
    number = error.metadata.get("number", "")
    damaged_block = (
        error.reason == ErrorReason.RECORD_CORRUPT
        and error.metadata.get("record", "block") == "block"
    )
    if damaged_block and number.isdecimal():
        # Deleted, or detached from the model, meanwhile: nothing is to be made again.
        with suppress(NotFoundError):
            await application.encoding.rebuild(asked.memory, snapshot.model, [int(number)])


async def documents(
    application: Application,
    memory: MemoryRow,
    numbers: Iterable[int],
    view: resources_pb2.DocumentView.ValueType,
) -> dict[int, resources_pb2.Document]:
    """Those of these documents that are live, by number."""
    rows = await application.catalog.get_documents(memory.uid, numbers)
    if view == resources_pb2.BASIC:
        return {n: document_to_wire(memory.memory_id, row, None) for n, row in rows.items()}
    sources = await read_sources(application, memory, list(rows))
    return {
        row.number: document_to_wire(memory.memory_id, row, source)
        for row, source in zip(rows.values(), sources, strict=True)
        if source is not None
    }


def ranked_to_wire(memory: MemoryRow, ranked: worker_pb.RankedDocument) -> pb.RankedDocument:
    """A ranked document without its content."""
    return pb.RankedDocument(
        document=names.document_name(memory.memory_id, ranked.number),
        number=ranked.number,
        score=ranked.score,
        layers=[pb.LayerScore(layer=s.layer, rank=s.rank, score=s.score) for s in ranked.layers],
        routing_score=ranked.routing_score,
        lexical_score=ranked.lexical_score,
    )
