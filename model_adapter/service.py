"""ModelAdapterService: requests in, jobs for the scheduler, results out."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpc import aio

from model_adapter import wire
from model_adapter.beside import Beside, Leased
from model_adapter.blending import DEPTH
from model_adapter.engine import (
    EncodeFailure,
    Event,
    FinishEvent,
    ModelDescription,
    RankedDocument,
    TextEvent,
)
from model_adapter.errors import InterruptedQueryError
from model_adapter.filtering import document_filter
from model_adapter.jobs import EncodeJob, Job, QueryJob, RouteJob
from model_adapter.pager import Budgets, Pager
from model_adapter.places import Places
from model_adapter.removals import removals
from model_adapter.residency import MemoryKey
from model_adapter.scheduler import Scheduler
from model_adapter.sinks import LoopSink
from model_adapter.status import translated
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceServicer
from storage.layout import KVBlock

#: Encoded blocks that may wait for a slow reader before its job pauses.
_ENCODED_WINDOW_BYTES = 16 * 1024 * 1024
#: More than cores: most wait for the disk.
_PAGING_THREADS = 16
#: Inside memsvc's own patience for an eviction, together.
_STOP_TIMEOUT_S = 4.0
_EVICT_TIMEOUT_S = 4.0

Context = aio.ServicerContext[Any, Any]


class ModelAdapter(ModelAdapterServiceServicer):
    """The service over one scheduler and one pager. `close` ends its threads."""

    def __init__(
        self, description: ModelDescription, scheduler: Scheduler, pager: Pager, budgets: Budgets
    ) -> None:
        self._description = wire.within_link(description)
        self._scheduler = scheduler
        self._pager = pager
        self._budgets = budgets
        self._threads = ThreadPoolExecutor(_PAGING_THREADS, thread_name_prefix="pager")
        self._places = Places(_PAGING_THREADS)

    def close(self) -> None:
        """Waits for page-ins under way."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """What is served, and what is held now."""
        own, held, load = self._description, self._pager.residency(), self._scheduler.load()
        return pb.GetInfoResponse(
            model_id=own.model_id,
            display_name=own.display_name,
            identity=own.identity,
            layout=wire.layout_message(own.layout),
            max_document_tokens=own.max_document_tokens,
            max_question_tokens=own.max_question_tokens,
            max_answer_tokens=own.max_answer_tokens,
            device=own.device,
            compute_dtype=own.compute_dtype,
            residency=pb.ResidencyInfo(
                routing_bytes=held.routing_bytes,
                routing_budget_bytes=self._budgets.routing_bytes,
                content_bytes=held.content_bytes,
                content_budget_bytes=self._budgets.content_bytes,
                resident_memories=held.memories,
                running_queries=load.running,
                waiting_queries=load.waiting,
                lexical_bytes=held.lexical_bytes,
                lexical_budget_bytes=self._budgets.lexical_bytes,
                attribute_bytes=held.attribute_bytes,
                attribute_budget_bytes=self._budgets.attribute_bytes,
            ),
            draining=load.draining,
            lexical_weight=own.lexical_weight,
            placement=own.placement,
            filters=True,
            removals=True,
        )

    async def Encode(
        self, request: pb.EncodeRequest, context: Context
    ) -> AsyncIterator[pb.EncodeResponse]:
        """Blocks as they are made."""
        async with translated(context):
            wire.check_identity(request.identity, self._description.identity)
            sink: LoopSink[KVBlock | EncodeFailure] = LoopSink(
                asyncio.get_running_loop(),
                _encoded_bytes,
                _ENCODED_WINDOW_BYTES,
                self._scheduler.wake,
            )
            job = EncodeJob(
                wire.memory_key(request.tenant, request.memory_uid, ""),
                sink,
                _deadline(context),
                documents=deque(wire.documents(request)),
            )
            self._scheduler.encode(job)
            try:
                async for item in sink.items():
                    yield wire.encode_response(item, self._description.layout)
            finally:
                self._abandon(job)

    async def Route(self, request: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        """Ranks."""
        found: list[RankedDocument] = []
        async with translated(context):
            key = self._memory(request.memory)
            question, limit = wire.route_question(request)
            sink: LoopSink[list[RankedDocument]] = LoopSink(asyncio.get_running_loop())
            beside = self._beside(request, question, limit)
            job = RouteJob(key, sink, _deadline(context), question=question, limit=limit)
            self._scheduler.admit(job)
            try:
                await self._page_in(job, request.memory, beside)
                async for ranking in sink.items():
                    found = ranking
            finally:
                self._abandon(job)
        return pb.RouteResponse(documents=wire.ranked(found), lexical_weight=wire.weight(job.prior))

    async def Query(
        self, request: pb.QueryRequest, context: Context
    ) -> AsyncIterator[pb.QueryResponse]:
        """Streams an answer."""
        received, times = time.monotonic(), wire.Times()
        async with translated(context):
            key = self._memory(request.memory)
            sink: LoopSink[Event] = LoopSink(asyncio.get_running_loop())
            generate = wire.generate(request)
            beside = self._beside(request, generate.question)
            job = QueryJob(key, sink, _deadline(context), request=generate)
            self._scheduler.admit(job)
            try:
                await self._page_in(job, request.memory, beside)
                times.page_in = time.monotonic() - received
                async for event in sink.items():
                    now = time.monotonic()
                    if isinstance(event, FinishEvent):
                        times.queue = job.started_at - job.queued_at
                        times.lexical, times.filter = beside.words_s, beside.filter_s
                        times.total = now - received
                        yield wire.finished(event.reason, job.counts, times)
                    else:
                        if isinstance(event, TextEvent) and not times.first_token:
                            times.first_token = now - received
                        yield wire.event(event)
            finally:
                self._abandon(job)

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        """Stops what reads the memory, then wipes it."""
        freed = 0
        async with translated(context):
            target = wire.evict_target(request)
            loop = asyncio.get_running_loop()
            freed = await loop.run_in_executor(None, self._evict, *target)
        return pb.EvictResponse(freed_bytes=freed, padding=bytes(len(request.padding)))

    def _evict(self, tenant: str, memory: str) -> int:
        self._scheduler.stop_memory(tenant, memory, _STOP_TIMEOUT_S)
        return self._pager.evict(tenant, memory, _EVICT_TIMEOUT_S)

    def _memory(self, ref: pb.MemoryRef) -> MemoryKey:
        wire.check_identity(ref.identity, self._description.identity)
        return wire.memory_key(ref.tenant, ref.memory_uid, "memory.")

    def _beside(
        self, request: pb.QueryRequest | pb.RouteRequest, question: str, limit: int = 0
    ) -> Beside:
        weight = wire.lexical_weight(request, self._description.lexical_weight)
        wanted, latest = document_filter(request), request.prefer_latest
        removed = removals(request.memory)
        return Beside(question, max(limit, DEPTH), weight, wanted, latest, removed)

    async def _page_in(self, job: QueryJob | RouteJob, ref: pb.MemoryRef, beside: Beside) -> None:
        """Leases the memory and queues the job with it. Raises what the pager raises.

        A caller that is cancelled leaves the thread to itself: it stops at its next slab,
        or what it brings is given back when the scheduler is offered a job that has ended.
        """
        await self._places.take(job.memory)
        lease: Future[Leased] = self._threads.submit(self._lease, job, ref, beside)
        queued = self._queue_when_leased(lease, job)
        await asyncio.shield(queued)

    def _lease(self, job: QueryJob | RouteJob, ref: pb.MemoryRef, beside: Beside) -> Leased:
        """Brings the memory in, and asks of it what is asked beside routing; in a thread."""
        unwanted = job.unwanted
        lease = self._pager.lease(
            job.memory, ref.last_number, ref.deletion_epoch, unwanted, wire.memory_secret(ref)
        )
        try:
            view = beside.view(lease, unwanted)
            job.take(beside.prior(lease, view, unwanted), beside.arrange(lease))
        except BaseException:
            lease.release()
            raise
        return lease, view

    def _queue_when_leased(
        self, lease: Future[Leased], job: QueryJob | RouteJob
    ) -> asyncio.Future[None]:
        async def queue() -> None:
            try:
                held, view = await asyncio.wrap_future(lease)
            finally:
                self._places.give_back(job.memory)
            self._scheduler.queue(job, view, held.release)

        task = asyncio.ensure_future(queue())
        # Its error is the waiting caller's; with none waiting it is nobody's.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _abandon(self, job: Job[Any]) -> None:
        """The caller is gone or served; what is left of the job ends at its next turn."""
        if not job.ended:
            self._scheduler.stop_job(job, InterruptedQueryError("the caller went away"))


def _deadline(context: Context) -> float | None:
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left


def _encoded_bytes(item: KVBlock | EncodeFailure) -> int:
    if isinstance(item, EncodeFailure):
        return 0
    arrays = (item.routing_key_LCE, item.key_LCE, item.value_LCE)
    return sum(array.nbytes for array in arrays if array is not None)
