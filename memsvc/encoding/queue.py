"""EncodingQueue: what the rest of the server knows of encoding."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.config import Config
from memsvc.encoding.batch import ModelState
from memsvc.encoding.looks import Looks
from memsvc.encoding.pipeline import Pipeline
from memsvc.encoding.pressure import Bounds
from memsvc.encoding.texts import Target
from memsvc.limits import Limiter
from memsvc.progress import Progress, TooManySubscribersError
from memsvc.stores import Stores
from memsvc.workers import ServedModel, Workers
from storage.catalog import (
    Catalog,
    CatalogError,
    EncodingRow,
    EncodingState,
    MemoryRow,
    ModelRow,
    NotFoundError,
)
from storage.failpoints import Failpoint, reach
from storage.store import TenantStore

log = logging.getLogger(__name__)

#: The backlog is counted this often, and never for more than a twentieth of the time.
_COUNT_EVERY_S = 1.0
_COUNT_SHARE = 20.0
#: A waiter looks again this often even without news.
_LOOK_AGAIN_S = 5.0


class EncodingQueue:
    """Keeps every memory encoded under the models attached to it, in the background."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        stores: Stores,
        progress: Progress,
        workers: Workers,
        *,
        limiter: Limiter,
    ) -> None:
        """limiter: told what was encoded for whom, and asked when it is whose turn."""
        self._config = config
        self._catalog = catalog
        self._stores = stores
        self._progress = progress
        self._workers = workers
        self._limiter = limiter
        self._bounds = Bounds(config.backlog_documents, config.backlog_bytes)
        self._states: dict[str, ModelState] = {}
        self._bounding: set[str] = set()
        self._counting = asyncio.Lock()
        self._pipelines: dict[ServedModel, tuple[Pipeline, asyncio.Task[None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        # Every write to a memory wakes all questions that wait for it.
        self._looks = Looks(self._look)

    async def start(self) -> None:
        """Begins to encode whatever waits."""
        await self._count()
        self._tasks = [
            asyncio.create_task(self._follow_workers()),
            asyncio.create_task(self._keep_counting()),
        ]

    def waiting(self) -> dict[str, int]:
        """Documents that wait, by model, as last counted. Any thread may ask."""
        states = {model_id: self._states.get(model_id) for model_id in self._bounding}
        return {name: one.backlog.total.documents for name, one in states.items() if one}

    def wake(self) -> None:
        """Documents were written."""
        for pipeline, _ in self._pipelines.values():
            pipeline.wake()

    async def drain(self) -> None:
        """Stops. What is in flight is given up: it is found again at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._stop(list(self._pipelines))

    def check_backpressure(self, tenant_uid: str, new_bytes: int, new_documents: int = 1) -> None:
        """Called before a write. Raises ENCODING_BACKLOG_FULL with a retry hint.

        new_bytes: UTF-8 bytes of source text. What passes counts as waiting from now on.
        """
        bounding = [self._state(model_id) for model_id in self._bounding]
        for state in bounding:
            self._bounds.check(state.backlog, state.rate, tenant_uid, new_documents, new_bytes)
        for state in bounding:
            state.backlog.admit(tenant_uid, new_documents, new_bytes)

    async def wait_encoded(
        self, memory: MemoryRow, model: ModelRow, revision: int, deadline: float
    ) -> EncodingRow:
        """Returns once every document up to `revision` is encoded under the model.

        deadline: time.monotonic() at which to give up. Raises ENCODING_NOT_READY
        naming how far it is, WORKER_UNAVAILABLE when no worker is there to go
        on, MEMORY_NOT_FOUND when the memory is deleted meanwhile, MODEL_NOT_ATTACHED,
        OVERLOADED.
        """
        try:
            with self._progress.subscribe(memory.uid, appends=False) as subscription:
                while True:
                    row = await self._encoding(memory, model)
                    if row.identity == model.identity and row.encoded_revision >= revision:
                        return row
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        raise self._late(row, model, revision)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(left_s, _LOOK_AGAIN_S)):
                            await subscription.changed()
        except TooManySubscribersError as error:
            raise errors.overloaded() from error

    async def require_complete(self, memory: MemoryRow, model: ModelRow) -> None:
        """For a model that a question names. Raises MODEL_NOT_ATTACHED, and ENCODING_NOT_READY
        while it has not caught up: that may take long, and the caller knows another model.
        """
        row = await self._encoding(memory, model)
        if not row.complete and memory.default_model_id != model.model_id:
            raise errors.encoding_not_ready(row, memory.revision)

    async def release(self, memory_uid: str, model_id: str) -> None:
        """Gives up what is on its way of a memory that was detached from a model."""
        found = [p for served, (p, _) in self._pipelines.items() if served.row.model_id == model_id]
        await asyncio.gather(*(pipeline.release(memory_uid) for pipeline in found))

    async def rebuild(self, memory: MemoryRow, model: ModelRow, numbers: Iterable[int]) -> None:
        """Blocks of these documents are damaged: deletes them and has them made again."""
        damaged = sorted(set(numbers))
        if not damaged:
            return
        target = Target.of(memory.uid, model.identity, model.layout)

        def delete(store: TenantStore) -> None:
            store.delete_blocks(target.memory, target.encoding, damaged)

        log.error("rebuilding %d damaged blocks of memory %s", len(damaged), memory.uid)
        sharing = await self._stores.read(
            memory.tenant_uid, lambda store: store.sharing(target.memory, damaged)
        )
        # The watermarks first: a crash in between costs a look at sound blocks, no more.
        await self._catalog.rewind_encoding(memory.uid, model.model_id, damaged[0])
        reach(Failpoint.REBUILD_REWOUND)
        others = [one.hex() for one in sharing if one != target.memory]
        for other in others:
            with suppress(NotFoundError):  # It is not attached to the model, or was deleted.
                await self._catalog.rewind_encoding(other, model.model_id, damaged[0])
        await self._stores.run(memory.tenant_uid, delete)
        reach(Failpoint.REBUILD_DELETED)
        for uid in (memory.uid, *others):
            # What a worker holds was read beside the damage.
            await self._workers.evict(memory.tenant_uid, uid)
            self._progress.publish(uid)
        self.wake()

    async def _encoding(self, memory: MemoryRow, model: ModelRow) -> EncodingRow:
        row = await self._looks.fresh((memory.uid, model.model_id))
        if row is not None:
            return row
        try:
            await self._catalog.get_memory_by_uid(memory.uid)
        except NotFoundError as error:
            raise errors.memory_not_found("memory") from error
        raise errors.model_not_attached(model.model_id)

    async def _look(self, key: tuple[str, str]) -> EncodingRow | None:
        return await self._catalog.get_encoding(*key)

    def _late(self, row: EncodingRow, model: ModelRow, revision: int) -> ApiError:
        if self._workers.find(model.model_id) is None:
            return errors.worker_unavailable(model.model_id)
        late = errors.encoding_not_ready(row, revision)
        if row.state is EncodingState.FAILED:
            late.metadata["failure"] = row.failure
        return late

    def _state(self, model_id: str) -> ModelState:
        return self._states.setdefault(model_id, ModelState())

    async def _follow_workers(self) -> None:
        """One pipeline per worker, for as long as it serves its model."""
        while True:
            seen = self._workers.generation
            served = {model: model for model in self._workers.served()}
            await self._stop([model for model in self._pipelines if model not in served])
            for model in served:
                if model not in self._pipelines:
                    self._begin(model)
            # Memories may have moved between them.
            self.wake()
            await self._try_count()
            await self._workers.changed(seen)

    def _begin(self, served: ServedModel) -> None:
        pipeline = Pipeline(
            served,
            self._state(served.row.model_id),
            workers=self._workers,
            config=self._config,
            catalog=self._catalog,
            stores=self._stores,
            progress=self._progress,
            limiter=self._limiter,
        )
        self._pipelines[served] = (pipeline, asyncio.create_task(pipeline.run()))

    async def _stop(self, models: Iterable[ServedModel]) -> None:
        stopped = [self._pipelines.pop(model)[1] for model in models]
        for task in stopped:
            task.cancel()
        await asyncio.gather(*stopped, return_exceptions=True)

    async def _keep_counting(self) -> None:
        while True:
            started = time.monotonic()
            await self._try_count()
            took_s = time.monotonic() - started
            await asyncio.sleep(max(_COUNT_EVERY_S, took_s * _COUNT_SHARE))

    async def _try_count(self) -> None:
        try:
            await self._count()
        except CatalogError as error:
            log.warning("cannot count the backlog: %s", type(error).__name__)
        except Exception as error:
            log.error("cannot count the backlog", exc_info=error)

    async def _count(self) -> None:
        """Counts what waits under the default model and every served one.

        Writes are bounded by these. A model that nobody serves any more and that
        is not the default must not stop them.
        """
        default = await self._catalog.default_model()
        counted = {served.row.model_id for served in self._workers.served()}
        if default is not None:
            counted.add(default.model_id)
        self._bounding = counted
        async with self._counting:
            for model_id in counted:
                backlog = self._state(model_id).backlog
                backlog.counting()
                backlog.counted(await self._catalog.pending_by_tenant(model_id))
