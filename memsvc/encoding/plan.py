"""One line of memories: whose documents are encoded next.

Tenants take turns, and so do the memories of a tenant: one batch each. A memory
in which something went wrong is handled with care: smaller batches, nothing
beside it, until a batch of it succeeds. So a document that kills the worker is
found, alone, and set aside, and no innocent one with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Losses of a document that was alone in the worker, until it is set aside.
MAX_STRIKES = 4
_NARROW = 4


@dataclass
class Trouble:
    """What is known of a memory whose last batch failed."""

    batch_documents: int
    strikes: int = 0


@dataclass
class Job:
    """One memory's backlog as it is being worked off.

    cursor: numbers up to it are planned. watermark: where the encoding's will be once every
    batch so far is committed. tail: the newest batch, which commits last. broken: a batch
    failed; nothing more is planned from here. dropped: nothing more may be sent. behind:
    another model answers for the memory meanwhile.
    """

    tenant_uid: str
    memory_uid: str
    cursor: int
    last_number: int
    tail: asyncio.Future[bool] | None = None
    in_flight: int = 0
    broken: bool = False
    dropped: bool = False
    behind: bool = False
    watermark: int = field(init=False)

    def __post_init__(self) -> None:
        self.watermark = self.cursor

    @property
    def exhausted(self) -> bool:
        """Nothing more to plan."""
        return self.broken or self.dropped or self.cursor >= self.last_number


@dataclass
class Plan:
    """The jobs known now, in the order they take turns."""

    jobs: dict[str, Job] = field(default_factory=dict)
    _tenants: deque[str] = field(default_factory=deque)
    _memories: dict[str, deque[str]] = field(default_factory=dict)

    def merge(self, found: Iterable[Job]) -> None:
        """Takes over what the catalog says waits; jobs with batches in flight go on as they are."""
        for memory_uid in [uid for uid, job in self.jobs.items() if not job.in_flight]:
            if self.jobs[memory_uid].exhausted:
                del self.jobs[memory_uid]
        for job in found:
            known = self.jobs.setdefault(job.memory_uid, job)
            if known.broken:
                continue
            known.last_number = max(known.last_number, job.last_number)
            self._queue(known)

    def next(self) -> Job | None:
        """The job whose turn it is; it goes to the end of its tenant's line, and that one back."""
        while self._tenants:
            tenant_uid = self._tenants.popleft()
            line = self._memories[tenant_uid]
            while line:
                job = self.jobs.get(line.popleft())
                if job is not None and not job.exhausted:
                    line.append(job.memory_uid)
                    self._tenants.append(tenant_uid)
                    return job
            del self._memories[tenant_uid]
        return None

    def forget(self, memory_uid: str) -> None:
        """Leaves a memory out, but for batches on their way."""
        job = self.jobs.get(memory_uid)
        if job is not None and not job.in_flight:
            del self.jobs[memory_uid]

    def _queue(self, job: Job) -> None:
        line = self._memories.get(job.tenant_uid)
        if line is None:
            line = self._memories[job.tenant_uid] = deque()
            self._tenants.append(job.tenant_uid)
        if job.memory_uid not in line:
            line.append(job.memory_uid)

    def drop(self, memory_uid: str) -> None:
        """The memory is gone, or not to be encoded here any more."""
        job = self.jobs.pop(memory_uid, None)
        if job is not None:
            job.dropped = True


class Troubles:
    """Memories to handle with care, over the lives of workers. Bounded by the backlog."""

    def __init__(self) -> None:
        self._troubles: dict[str, Trouble] = {}

    def __bool__(self) -> bool:
        return bool(self._troubles)

    def limit(self, memory_uid: str, otherwise: int) -> int:
        """Most documents of this memory's next batch."""
        trouble = self._troubles.get(memory_uid)
        return min(otherwise, trouble.batch_documents) if trouble else otherwise

    def failed(self, memory_uid: str, documents: int, *, alone: bool) -> bool:
        """A batch failed. True: its only document has failed alone too often."""
        trouble = self._troubles.setdefault(memory_uid, Trouble(documents))
        trouble.batch_documents = max(1, documents // _NARROW)
        trouble.strikes = trouble.strikes + 1 if alone and documents == 1 else 0
        return trouble.strikes >= MAX_STRIKES

    def succeeded(self, memory_uid: str, documents: int, normal: int) -> None:
        """A batch went through: widen, and forget when it is as wide as any."""
        trouble = self._troubles.get(memory_uid)
        if trouble is None:
            return
        trouble.strikes = 0
        trouble.batch_documents = max(trouble.batch_documents, documents) * _NARROW
        if trouble.batch_documents >= normal:
            del self._troubles[memory_uid]

    def forget_all_but(self, memory_uids: Iterable[str]) -> None:
        """Only these wait; the others have been deleted or are done."""
        waiting = set(memory_uids)
        for memory_uid in self._troubles.keys() - waiting:
            del self._troubles[memory_uid]
