"""Batches of one model on their way: store -> worker -> store -> catalog.

One pipeline per worker: of the model's memories it takes those that are placed there.
A memory that moves while a batch of it is on its way is encoded by both for a moment;
the catalog takes the first result and refuses the other.

Up to MAX_ALIVE batches exist at once, of which MAX_ENCODING are in the worker:
while one is computed the next already waits there, and the blocks of the last
are written. Batches of one memory are written in any order and committed in
ascending order, so the watermark never passes a document that has no block.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress

from memsvc.api_error import ApiError
from memsvc.config import MIB, Config
from memsvc.encoding.agenda import Agenda
from memsvc.encoding.batch import Batch, ModelState
from memsvc.encoding.plan import Job
from memsvc.encoding.share import Share
from memsvc.encoding.texts import (
    CORRUPT,
    Target,
    Texts,
    drop_encodings,
    read_texts,
    write_live_blocks,
)
from memsvc.limits import Limiter
from memsvc.progress import Progress
from memsvc.stores import Stores
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.workers import (
    EncodeFailure,
    ServedModel,
    WorkerFaultError,
    Workers,
    cause_elsewhere,
)
from storage.catalog import Catalog, CatalogError, EncodingState, NotFoundError
from storage.failpoints import Failpoint, reach
from storage.layout import KVBlock
from storage.store import StorageError, StorageFullError

log = logging.getLogger(__name__)

MAX_ALIVE = 4
MAX_ENCODING = 2
#: Blocks of one LMDB transaction: from 16 up the disk's rate is nearly reached.
_WRITE_BLOCKS = 16
_WRITE_BYTES = 16 * MIB
#: Texts read in one go.
_READ_DOCUMENTS = 16
#: Without any news the catalog is looked at this often.
_IDLE_S = 5.0
_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.2, 5.0
_INFO_TIMEOUT_S = 10.0

#: Reason under which a document that the worker cannot survive is set aside.
ENCODE_FAILED = "INTERNAL_FAULT"


class Pipeline:
    """Encodes the backlog of one model with the worker that serves it now."""

    def __init__(
        self,
        served: ServedModel,
        state: ModelState,
        *,
        workers: Workers,
        config: Config,
        catalog: Catalog,
        stores: Stores,
        progress: Progress,
        limiter: Limiter,
    ) -> None:
        self._served = served
        self._model = served.row
        self._state = state
        self._config = config
        self._catalog = catalog
        self._stores = stores
        self._progress = progress
        self._share = Share(config.reencode_share)
        self._agenda = Agenda(served, state, self._share, catalog, workers)
        self._limiter = limiter
        self._news = asyncio.Event()
        self._encoding = asyncio.Semaphore(MAX_ENCODING)
        self._batches: dict[asyncio.Task[bool], Batch] = {}
        self._backoff_s = 0.0

    def wake(self) -> None:
        """Something was written: look at the catalog."""
        self._agenda.stale = True
        self._news.set()

    async def run(self) -> None:
        """Runs until cancelled; then batches in flight are given up."""
        try:
            while True:
                self._news.clear()
                if not await self._advance():
                    if not self._batches:
                        self._state.rate.resume()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._pause_s()):
                            await self._news.wait()
        finally:
            for task in self._batches:
                task.cancel()
            await asyncio.gather(*self._batches, return_exceptions=True)

    async def release(self, memory_uid: str) -> None:
        """Gives up what is planned or on its way of a memory; nothing of it is written later,
        unless the catalog says again that it waits."""
        self._agenda.drop(memory_uid)
        tasks = [
            task for task, batch in self._batches.items() if batch.job.memory_uid == memory_uid
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pause_s(self) -> float:
        """How long to wait without news."""
        if self._backoff_s:
            return self._backoff_s
        due_s = self._agenda.due_s
        # Where it is due already, all of it is on its way.
        return min(due_s, _IDLE_S) if due_s else _IDLE_S

    async def _advance(self) -> bool:
        """Starts one batch if there is one and room for it. False: wait for news."""
        room = 1 if self._state.troubles else MAX_ALIVE
        if len(self._batches) >= room:
            return False
        if self._backoff_s:
            await asyncio.sleep(self._backoff_s)
            if not await self._answers():
                return False
        try:
            batch = await self._next()
        except (CatalogError, StorageError) as error:
            self._failed(f"cannot read the backlog: {type(error).__name__}")
            return False
        except Exception as error:
            log.error("cannot read the backlog", exc_info=error)
            self._failed("cannot read the backlog")
            return False
        if batch is None:
            return False
        task = asyncio.create_task(self._carry(batch))
        self._batches[task] = batch
        task.add_done_callback(self._ended)
        return True

    async def _answers(self) -> bool:
        """Whether the worker is there, after something failed: else the next batch would be
        blamed for a worker that is still down."""
        try:
            await self._served.client.info(_INFO_TIMEOUT_S, wait_for_ready=False)
        except (ApiError, WorkerFaultError):
            self._served.endpoint.suspect()
            return False
        return True

    def _ended(self, task: asyncio.Task[bool]) -> None:
        """Also of one that was cancelled before its first step."""
        batch = self._batches.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("encoding batch failed", exc_info=error)
        done = not task.cancelled() and error is None and task.result()
        job = batch.job
        if job.behind:
            self._share.end(batch.texts.text_bytes if done else 0)
        job.in_flight -= 1
        if not job.in_flight:
            self._agenda.done(job.memory_uid)
        job.broken = job.broken or not done
        batch.committed.set_result(done)
        self._agenda.stale = self._agenda.stale or job.behind or not done
        self._news.set()

    async def _next(self) -> Batch | None:
        """The next batch, its texts read; None when nothing waits that isn't in flight."""
        while True:
            refreshed = self._agenda.stale
            if refreshed:
                await self._agenda.refresh()
            while (job := self._agenda.next()) is not None:
                batch = await self._read(job)
                if batch is not None:
                    return batch
            if refreshed:
                return None
            self._agenda.stale = True

    def _target(self, job: Job) -> Target:
        return Target.of(job.memory_uid, self._model.identity, self._model.layout)

    async def _read(self, job: Job) -> Batch | None:
        """Reads the job's next documents; None when none of the window is alive."""
        limit = self._state.troubles.limit(job.memory_uid, self._config.encode_batch_documents)
        window = min(job.cursor + limit, job.last_number)
        numbers = await self._catalog.live_numbers(job.memory_uid, job.cursor + 1, window)
        if not numbers:
            job.cursor = window
            return None
        texts = await self._texts(job, numbers)
        quarantined = dict.fromkeys(texts.corrupt, CORRUPT)
        quarantined.update(await self._lost(job, texts.missing))
        if job.dropped:
            return None
        if job.behind:
            self._share.begin()
        previous, job.tail = job.tail, asyncio.get_running_loop().create_future()
        job.in_flight += 1
        job.cursor = texts.up_to if texts.up_to < numbers[-1] else window
        above, job.watermark = job.watermark, job.cursor
        return Batch(
            job,
            texts,
            above=above,
            up_to=job.cursor,
            previous=previous,
            committed=job.tail,
            quarantined=quarantined,
            alone=not self._batches,
        )

    async def _texts(self, job: Job, numbers: Sequence[int]) -> Texts:
        """A few at a time: while a thread works, the calls of others wait for the interpreter."""
        texts, target = Texts(self._batch_bytes(job)), self._target(job)
        for first in range(0, len(numbers), _READ_DOCUMENTS):
            part = numbers[first : first + _READ_DOCUMENTS]
            await self._limiter.turns.step(job.tenant_uid)
            if not await self._stores.read(job.tenant_uid, read_texts, target, part, texts):
                break
        return texts

    def _batch_bytes(self, job: Job) -> int:
        wanted = self._share.batch_bytes if job.behind else self._state.batch_bytes
        return min(wanted, self._config.encode_batch_bytes)

    async def _lost(self, job: Job, missing: Sequence[int]) -> dict[int, str]:
        """Documents without text are either deleted by now, or lost."""
        lost: dict[int, str] = {}
        for number in missing:
            if await self._catalog.live_numbers(job.memory_uid, number, number):
                log.error("document %d of memory %s has no text", number, job.memory_uid)
                lost[number] = CORRUPT
        return lost

    async def _carry(self, batch: Batch) -> bool:
        """Takes one batch all the way; whether it got there."""
        job = batch.job
        try:
            reach(Failpoint.ENCODE_READ)
            async with self._encoding:
                await self._encode(batch)
            if batch.previous is None or await asyncio.shield(batch.previous):
                await self._commit(batch)
                return True
        except NotFoundError:
            self._agenda.drop(job.memory_uid)
        except StorageFullError:
            self._failed("storage is full")
            await self._record_failure(job, "storage is full")
        except (CatalogError, StorageError) as error:
            self._failed(f"cannot write: {type(error).__name__}")
        except ApiError as error:
            await self._interrupted(batch, error)
        except WorkerFaultError as error:
            self._failed(str(error))
            await self._blame(batch)
        return False

    async def _encode(self, batch: Batch) -> None:
        """Sends the documents, writes blocks as they come, a group behind the stream."""
        if not batch.texts.documents:
            return
        target = self._target(batch.job)
        results = self._served.client.encode(
            batch.job.tenant_uid,
            batch.job.memory_uid,
            batch.texts.documents,
            self._model.identity,
            self._model.layout,
        )
        group: list[KVBlock] = []
        size = 0
        writing: asyncio.Task[None] | None = None
        try:
            async for result in results:
                if isinstance(result, EncodeFailure):
                    batch.quarantined[result.number] = result.reason
                    continue
                reach(Failpoint.ENCODE_RECEIVED)
                group.append(result)
                size += self._model.layout.block_bytes(result.tokens)
                if len(group) >= _WRITE_BLOCKS or size >= _WRITE_BYTES:
                    await _finished(writing)
                    writing = asyncio.create_task(self._write(batch, target, group))
                    group, size = [], 0
            await _finished(writing)
            writing = None
            if group:
                await self._write(batch, target, group)
        finally:
            await results.aclose()
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, batch: Batch, target: Target, blocks: Sequence[KVBlock]) -> None:
        await self._limiter.turns.step(batch.job.tenant_uid)
        stored, written = await self._stores.run(
            batch.job.tenant_uid, write_live_blocks, target, blocks
        )
        reach(Failpoint.ENCODE_STORED)
        batch.stored_bytes += stored
        batch.documents += len(written)
        batch.tokens += sum(block.tokens for block in written)

    async def _commit(self, batch: Batch) -> None:
        """Moves the watermark; what was encoded before a crash is counted here too."""
        done = batch.texts.done
        row = await self._catalog.commit_encoded(
            batch.job.memory_uid,
            self._model.model_id,
            self._model.identity,
            batch.up_to,
            documents=batch.documents + len(done),
            tokens=batch.tokens + sum(done.values()),
            bytes=batch.stored_bytes + sum(map(self._model.layout.block_bytes, done.values())),
            quarantined=batch.quarantined,
            above_number=batch.above,
            spent_tokens=batch.tokens,
        )
        reach(Failpoint.ENCODE_COMMITTED)
        if batch.tokens:
            self._limiter.spend_tokens(batch.job.tenant_uid, batch.tokens)
        self._backoff_s = 0.0
        if not batch.job.behind:
            # Pauses are no measure of the worker.
            self._state.rate.add(batch.texts.text_bytes)
        self._state.troubles.succeeded(
            batch.job.memory_uid, batch.size, self._config.encode_batch_documents
        )
        for number, reason in batch.quarantined.items():
            log.warning("document %d of %s set aside: %s", number, batch.job.memory_uid, reason)
        self._progress.publish(batch.job.memory_uid)
        if self._served.replaces and row.state is EncodingState.READY:
            await self._drop_replaced(batch.job)

    async def _drop_replaced(self, job: Job) -> None:
        """Blocks of the weights that this model had before are of no more use."""
        known = await self._catalog.list_encodings(job.memory_uid)
        keep = (Target.of(row.memory_uid, row.identity, self._model.layout) for row in known)
        target = self._target(job)
        await self._stores.run(
            job.tenant_uid, drop_encodings, target.memory, frozenset(t.encoding for t in keep)
        )

    async def _interrupted(self, batch: Batch, error: ApiError) -> None:
        """The worker is gone, or did not take the batch, or was told to let go of its memory."""
        cause = cause_elsewhere(error)
        if cause == "evicted":
            log.info("encoding under %s goes on after an eviction", self._model.model_id)
            return
        self._served.endpoint.suspect()
        self._failed(error.message)
        if not cause:
            await self._blame(batch)

    async def _blame(self, batch: Batch) -> None:
        """The worker failed with this batch in it, by its fault or not."""
        hopeless = self._state.troubles.failed(batch.job.memory_uid, batch.size, alone=batch.alone)
        if not hopeless:
            return
        batch.quarantined[batch.texts.documents[0].number] = ENCODE_FAILED
        with suppress(CatalogError):
            if batch.previous is None or await asyncio.shield(batch.previous):
                await self._commit(batch)

    async def _record_failure(self, job: Job, failure: str) -> None:
        with suppress(CatalogError):
            await self._catalog.fail_encoding(job.memory_uid, self._model.model_id, failure)
        self._agenda.resume = True
        self._progress.publish(job.memory_uid)

    def _failed(self, what: str) -> None:
        """Slows down; the first success ends that."""
        self._backoff_s = min(max(self._backoff_s * 2, _BACKOFF_FIRST_S), _BACKOFF_LAST_S)
        log.warning("encoding under %s: %s", self._model.model_id, what)


async def _finished(writing: Awaitable[None] | None) -> None:
    if writing is not None:
        await writing


#: Kept beside the vocabulary: a reason that is recorded must be one of it.
assert {CORRUPT, ENCODE_FAILED} <= set(ErrorReason.keys())
