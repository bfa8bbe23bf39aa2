"""Decides what the engine does next. One engine thread, plain Python.

Each turn of the loop:
  1. jobs that were cancelled, evicted or ran out of time leave;
  2. waiting queries start while there are places, tenants in turn (`turns`), and at
     most one ranking is run;
  3. every running query advances by one step, all in one batch;
  4. a batch of documents is encoded: each turn while no query runs; while some do,
     whenever they had their share of the engine's time since the last (`pacing`), so that
     neither starves. Batches are small then, and for a while after the last query: the
     next one that comes must not find the engine in the middle of a long one.
Encode jobs take turns batch by batch, so a long one delays a short one little.
A document much too long for a busy batch waits for a turn without queries, but not
for longer than `long_document_patience_s`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from model_adapter.allocator import FreedMemory
from model_adapter.engine import (
    DocumentText,
    Encoded,
    Engine,
    EngineError,
    MemoryView,
    StepResult,
)
from model_adapter.errors import (
    DrainingError,
    InterruptedQueryError,
    MemoryInUseError,
    OverloadedError,
    internal_fault,
)
from model_adapter.jobs import EncodeJob, Job, QueryJob, RouteJob, text_bytes
from model_adapter.limits import Limits, Load
from model_adapter.pacing import EncodePacer, EncodeShare
from model_adapter.turns import Line, has_room, tenants_of

#: A document of more than this many busy batches' size waits for a quiet turn.
_LONG_DOCUMENT = 4


class Scheduler:
    """Thread-safe. Jobs are admitted, paged in by the caller, then queued.

    An admitted job ends exactly once: by finishing, by `stop_job`, or by draining.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        share: EncodeShare | None = None,
        on_fault: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """on_fault: called once, from the engine's thread, when the scheduler itself fails.

        clock: seconds, for the engine's own durations.
        """
        self._engine = engine
        self._limits = limits or Limits()
        self._on_fault = on_fault
        self._wake = threading.Condition()
        self._paging: set[Job[Any]] = set()
        self._waiting = Line()
        self._starting: list[QueryJob | RouteJob] = []
        self._running: list[QueryJob] = []
        self._encoding: deque[EncodeJob] = deque()
        #: The job of the batch that is being encoded.
        self._batch_of: EncodeJob | None = None
        #: Whose memories the engine is reading: they end at their next turn, and no sooner.
        self._read_for: frozenset[Job[Any]] = frozenset()
        self._asked_at = -math.inf
        self._pacer = EncodePacer(share)
        self._clock = clock
        self._freed = FreedMemory()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def load(self) -> Load:
        """Queries now."""
        with self._wake:
            waiting = len(self._waiting) + len(self._paging)
            return Load(len(self._running), waiting, self._draining)

    def admit(self, job: QueryJob | RouteJob) -> None:
        """Takes a place for a job that is about to be paged in.

        Raises OverloadedError, DrainingError; the job then never was.
        """
        with self._wake:
            self._refuse_if_draining()
            here = tenants_of((*self._waiting, *self._paging))
            mine = here[job.memory.tenant]
            if not has_room(self._limits.waiting_queries, here.total(), mine):
                raise OverloadedError("too many queries wait", cause="full")
            self._paging.add(job)

    def queue(
        self, job: QueryJob | RouteJob, view: MemoryView, release: Callable[[], None]
    ) -> None:
        """Hands over an admitted job with its view; release is called when the job ends.

        A job that ended while it was paged in gives its view back at once.
        """
        with self._wake:
            alive = job in self._paging
            if alive:
                self._paging.discard(job)
                job.view, job.release = view, release
                if isinstance(job, QueryJob):
                    job.queued_at = time.monotonic()
                self._waiting.add(job)
                self._wake.notify_all()
        if not alive:
            release()

    def encode(self, job: EncodeJob) -> None:
        """Takes an encode job of one document at least. Raises OverloadedError, DrainingError."""
        assert job.documents
        size = sum(text_bytes(document) for document in job.documents)
        with self._wake:
            self._refuse_if_draining()
            held = sum(text_bytes(d) for other in self._encoding for d in other.documents)
            # One job alone is always taken: a request's size is bounded by the wire.
            too_much = held and held + size > self._limits.encode_bytes
            if too_much or len(self._encoding) >= self._limits.encode_jobs:
                raise OverloadedError("too many documents wait to be encoded", cause="full")
            self._encoding.append(job)
            self._wake.notify_all()

    def wake(self) -> None:
        """A sink that was not ready is."""
        with self._wake:
            self._wake.notify_all()

    def stop_job(self, job: Job[Any], error: EngineError) -> None:
        """Ends a job at its next turn. A job that is being paged in ends here and now."""
        with self._wake:
            self._stop([job], error)

    def stop_memory(self, tenant: str, memory: str = "", timeout_s: float = 5.0) -> None:
        """Ends every job on a memory, or on a tenant; waits until they have, and left nothing.

        What the engine is not at ends here and now, whatever that is at. A batch of documents
        is waited for no longer than timeout_s: it reads no memory, and what comes of it later is
        dropped. Raises MemoryInUseError when a query is still busy then; it ends later.
        """
        error = InterruptedQueryError("the memory was evicted from the worker", cause="evicted")
        deadline = time.monotonic() + timeout_s
        with self._wake:
            while left := self._end_on(tenant, memory, error):
                left_s = deadline - time.monotonic()
                if left_s > 0:
                    self._wake.wait(left_s)
                elif left == [self._batch_of]:
                    self._batch_of = None
                    self._end(left)
                else:
                    raise MemoryInUseError("the memory is still being read")
        self._engine.settle()

    def drain(self, grace_s: float) -> None:
        """Refuses new jobs, drops encode jobs, lets queries finish for grace_s, then stops.

        Encoding is dropped because it is asked for again. Blocks until the thread ended.
        """
        error = DrainingError("the worker is going down", cause="draining")
        deadline = time.monotonic() + grace_s
        with self._wake:
            self._draining = True
            self._stop([job for job in self._jobs() if isinstance(job, EncodeJob)], error)
            while self._jobs() and (left := deadline - time.monotonic()) > 0:
                self._wake.wait(left)
            self._stop(self._jobs(), error)
            self._stopped = True
        self._thread.join()

    def _stop(self, jobs: Sequence[Job[Any]], error: EngineError) -> None:
        for job in jobs:
            job.stopping = job.stopping or error
            if job in self._paging:
                self._paging.discard(job)
                job.end(job.stopping)
        self._wake.notify_all()

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise DrainingError("the worker is going down", cause="draining")

    def _jobs(self) -> list[Job[Any]]:
        batch_of = [self._batch_of] if self._batch_of is not None else []
        queries = (*self._paging, *self._waiting, *self._starting, *self._running)
        return [*queries, *self._encoding, *batch_of]

    def _end_on(self, tenant: str, memory: str, error: EngineError) -> list[Job[Any]]:
        """Stops what is on a memory; those that the engine is at, and that so go on for now."""
        self._stop([job for job in self._jobs() if job.memory.within(tenant, memory)], error)
        self._end(self._take_out())
        return [job for job in self._jobs() if job.memory.within(tenant, memory)]

    def _take_out(self) -> set[Job[Any]]:
        """Jobs that are to end and that the engine is not at; they are in no line any more."""
        kept = {*self._paging, *self._read_for, self._batch_of}
        over = {job for job in self._jobs() if job.stopping is not None} - kept
        self._waiting.drop_stopping()
        self._running = [job for job in self._running if job not in over]
        self._encoding = deque(job for job in self._encoding if job not in over)
        return over

    @staticmethod
    def _end(jobs: Iterable[Job[Any]]) -> None:
        for job in jobs:
            job.end(job.stopping)

    # The engine's thread.

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # noqa: BLE001  # without this thread the worker is of no use
            fault = internal_fault(error)
            with self._wake:
                self._draining = True
                over = self._jobs()
                self._paging.clear()
                self._waiting.clear()
                self._running.clear()
                self._encoding.clear()
                self._starting, self._batch_of = [], None
                self._wake.notify_all()
            for job in over:
                job.end(fault)
            self._on_fault()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._has_work() or self._stopped):
                    self._wake.wait(self._idle_s())
                if self._stopped and not self._has_work():
                    return
            self._turn()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running) or any(
            job.stopping is not None or job.sink.ready() for job in self._encoding
        )

    def _idle_s(self) -> float | None:
        """Until the first deadline among jobs that can't go on."""
        deadlines = [job.deadline for job in self._encoding if job.deadline is not None]
        return max(min(deadlines) - time.monotonic(), 0.001) if deadlines else None

    def _turn(self) -> None:
        now = time.monotonic()
        with self._wake:
            for job in self._jobs():
                job.verdict(now)
            ended = self._take_out()
            self._starting = self._waiting.take(self._running, self._limits.running_queries)
            self._read_for = frozenset(self._starting)
            asked = bool(self._starting or self._running)
        self._end(ended)
        for waiting in self._starting:
            self._begin(waiting)
        self._step()
        if asked:
            self._asked_at = self._clock()
        self._encode_some()
        with self._wake:
            self._wake.notify_all()

    def _begin(self, job: QueryJob | RouteJob) -> None:
        assert job.view is not None
        try:
            if job.stopping is not None:
                job.end(job.stopping)
                return
            if isinstance(job, RouteJob):
                found = self._engine.route(
                    job.question, job.view, job.limit, job.prior, job.arrange
                )
                job.sink.put(found)
                job.end(None)
                return
            job.started_at = time.monotonic()
            job.generation = self._engine.start(job.request, job.view)
        except EngineError as error:
            job.end(error)
        except Exception as error:  # noqa: BLE001  # an engine's fault ends its job, not the worker
            job.end(internal_fault(error))
        else:
            with self._wake:
                self._running.append(job)

    def _step(self) -> None:
        with self._wake:
            self._starting, running = [], list(self._running)
            self._read_for = frozenset(running)
        if running:
            self._advance(running)
        with self._wake:
            self._read_for = frozenset()
            self._wake.notify_all()

    def _advance(self, running: Sequence[QueryJob]) -> None:
        generations = [job.generation for job in running if job.generation is not None]
        began = self._clock()
        try:
            results = self._engine.step(generations)
        except Exception as error:  # noqa: BLE001  # as above
            # Among several it is not known whose fault it is, and none may learn of another's.
            known = isinstance(error, EngineError) and len(running) == 1
            fault = error if known and isinstance(error, EngineError) else internal_fault(error)
            results = [StepResult(generation, (), fault) for generation in generations]
        self._pacer.stepped(self._clock() - began)
        over = {
            job for job, result in zip(running, results, strict=True) if self._deliver(job, result)
        }
        if over:
            with self._wake:
                self._running = [job for job in self._running if job not in over]

    @staticmethod
    def _deliver(job: QueryJob, result: StepResult) -> bool:
        """Passes on what a step made; True when the job is over."""
        assert job.generation is result.generation
        job.counts = result.generation.counts
        for event in result.events:
            job.sink.put(event)
        if result.error is None and not result.generation.done:
            return False
        job.end(result.error)
        return True

    def _encode_some(self) -> None:
        batch = self._take_encode()
        if batch is None:
            return
        job, documents = batch
        error: EngineError | None = None
        encoded = Encoded()
        began = self._clock()
        try:
            encoded = self._engine.encode(documents)
        except EngineError as refused:
            error = refused
        except Exception as fault:  # noqa: BLE001  # as above
            error = internal_fault(fault)
        self._pacer.encoded(sum(map(text_bytes, documents)), self._clock() - began)
        with self._wake:
            if self._batch_of is None:  # An eviction ended it meanwhile.
                return
            if error is None and job.stopping is None:
                for block in encoded.blocks:
                    job.sink.put(block)
                for failure in encoded.failures:
                    job.sink.put(failure)
            self._batch_of = None
            over = error is not None or not job.documents
            if not over:
                job.waiting_since = time.monotonic()
                self._encoding.append(job)
        if over:
            job.end(error or job.stopping)
        self._freed.bound()

    def _take_encode(self) -> tuple[EncodeJob, Sequence[DocumentText]] | None:
        """The next batch and its job, which is then out of the queue; None when it must wait."""
        with self._wake:
            busy = bool(self._running or self._waiting)
            if not self._pacer.due(busy):
                return None
            quiet_s = 0.0 if busy else self._clock() - self._asked_at
            size = self._pacer.batch_bytes(quiet_s)
            for job in self._encoding:
                if job.sink.ready() and not (busy and self._too_long(job, size)):
                    self._encoding.remove(job)
                    self._batch_of = job
                    return job, job.take(size)
        return None

    def _too_long(self, job: EncodeJob, size: int) -> bool:
        waited = time.monotonic() - job.waiting_since
        much_longer = text_bytes(job.documents[0]) > _LONG_DOCUMENT * size
        return much_longer and waited < self._limits.long_document_patience_s
