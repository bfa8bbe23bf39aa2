"""Which of the memories placed on a worker it encodes next.

Two plans, in two lines: memories that wait for this model to answer, and memories that
are being encoded under it while another one answers (an attached model that has not
caught up). The second line gets a bounded share of the worker's time, and no less.
"""

from __future__ import annotations

from collections.abc import Iterable

from memsvc.encoding.batch import ModelState
from memsvc.encoding.plan import Job, Plan
from memsvc.encoding.share import Share
from memsvc.workers import ServedModel, Workers
from storage.catalog import Catalog, EncodingRow, MemoryRow

_MEMORIES, _MOST_MEMORIES = 64, 1000

_Waiting = list[tuple[str, MemoryRow, EncodingRow]]


class Agenda:
    """One worker's. stale: the catalog may know more than what is planned."""

    def __init__(
        self,
        served: ServedModel,
        state: ModelState,
        share: Share,
        catalog: Catalog,
        workers: Workers,
    ) -> None:
        self._served = served
        self._model = served.row
        self._state = state
        self._share = share
        self._catalog = catalog
        self._workers = workers
        self._plan = Plan()
        self._behind = Plan()
        self._drops = 0
        self._done: set[str] = set()
        # Encodings that an earlier worker gave up are tried again.
        self.resume = True
        self.stale = True

    @property
    def due_s(self) -> float | None:
        """Seconds until the second line may go on; None when it is empty or has a batch out."""
        return self._share.wait_s if self._behind.jobs else None

    def next(self) -> Job | None:
        """Whose turn it is. The second line first where it is due: else it might never be."""
        while True:
            job = self._behind.next() if self._share.due else None
            job = job or self._plan.next()
            if job is None or self._mine(job.memory_uid):
                return job
            self.drop(job.memory_uid)

    def drop(self, memory_uid: str) -> None:
        """The memory is gone, or not to be encoded here; unless the catalog says so again."""
        self._drops += 1
        self._plan.drop(memory_uid)
        self._behind.drop(memory_uid)

    def done(self, memory_uid: str) -> None:
        """Nothing of the memory is on its way any more."""
        self._done.add(memory_uid)

    async def refresh(self) -> None:
        """Takes over what the catalog says waits."""
        if self.resume:
            await self._catalog.resume_encodings(self._model.model_id)
            self.resume = False
        self.stale = False
        drops = self._drops
        self._done.clear()
        first, all_first = await self._waiting(behind=False)
        second, all_second = await self._waiting(behind=True)
        if drops != self._drops:
            # It was read before that, or after.
            self.stale = True
            return
        if all_first and all_second:
            self._state.troubles.forget_all_but(m.uid for _, m, _ in first + second)
        # Where nobody answers meanwhile, it is waited for.
        urgent = [w for w in second if self._workers.find(w[1].default_model_id) is None]
        later = [waits for waits in second if waits not in urgent]
        self._merge(self._jobs(first + urgent), self._jobs(later, behind=True))
        # What was read of them may be from before their last batch: they are looked at again.
        self.stale = self.stale or bool(self._done)

    def _merge(self, jobs: Iterable[Job], later: Iterable[Job]) -> None:
        """A memory is in one line at a time: in the other as soon as nothing of it is out."""
        taken = list(jobs)
        for job in taken:
            self._behind.forget(job.memory_uid)
        self._plan.merge(job for job in taken if job.memory_uid not in self._behind.jobs)
        waiting = list(later)
        for job in waiting:
            self._plan.forget(job.memory_uid)
        self._behind.merge(job for job in waiting if job.memory_uid not in self._plan.jobs)

    async def _waiting(self, *, behind: bool) -> tuple[_Waiting, bool]:
        """What waits, the longest waiting first, and whether that is all of it."""
        limit = _MEMORIES
        while True:
            found = await self._catalog.backlog(self._model.model_id, limit, behind=behind)
            complete = len(found) < limit
            # What waits longest may all be another worker's.
            mine = any(self._mine(memory.uid) for _, memory, _ in found)
            if mine or complete or limit >= _MOST_MEMORIES:
                return found, complete
            limit = min(4 * limit, _MOST_MEMORIES)

    def _jobs(self, waiting: _Waiting, *, behind: bool = False) -> list[Job]:
        return [
            Job(tenant, memory.uid, encoding.encoded_number, memory.last_number, behind=behind)
            for tenant, memory, encoding in waiting
            if encoding.identity == self._model.identity
            and self._mine(memory.uid)
            and memory.uid not in self._done
        ]

    def _mine(self, memory_uid: str) -> bool:
        return self._workers.place(self._model.model_id, memory_uid) is self._served
