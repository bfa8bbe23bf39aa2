"""What the scheduler promises, watched at the engine seam."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from model_adapter.engine import Generate, QuestionTooLongError
from model_adapter.errors import (
    CorruptRecordError,
    DeadlineError,
    DrainingError,
    InternalFaultError,
    InterruptedQueryError,
    MemoryInUseError,
    OverloadedError,
)
from model_adapter.fake import FakeEngine
from model_adapter.jobs import QueryJob
from model_adapter.msa.memory import InMemoryView
from model_adapter.scheduler import Scheduler
from tests.support.jobs import (
    BOAT,
    CHESS,
    GARDEN,
    MEMORY,
    TEXTS,
    ListSink,
    Make,
    WatchedEngine,
    ask,
    encode,
    events_alone,
    eventually,
    rank,
)
from tests.support.pages import OTHER_TENANT, TENANT, key


def test_a_query_runs_to_its_end(make: Make, view: InMemoryView) -> None:
    asked = ask(make(), MEMORY, view, BOAT)
    assert asked.sink.wait().error is None
    assert asked.finished()
    assert asked.sink.text() == TEXTS[1]
    assert asked.released == [True]
    assert asked.job.counts.answer_tokens == len(TEXTS[1].split())
    assert asked.job.view is None
    assert asked.job.generation is None


def test_a_query_joins_between_steps_and_changes_no_other(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make()
    engine.hold()
    first = ask(scheduler, MEMORY, view, BOAT)
    engine.go(4)
    second = ask(scheduler, MEMORY, view, CHESS)
    engine.go(3)
    third = ask(scheduler, key(2), view, GARDEN)
    engine.let_go()
    for asked, question in ((first, BOAT), (second, CHESS), (third, GARDEN)):
        assert asked.sink.wait().items == events_alone(FakeEngine(), Generate(question, 0), view)
    sizes = [size for what, size in engine.calls if what == "step"]
    assert sizes[:4] == [1] * 4
    assert max(sizes) == 3


def test_running_and_waiting_queries_are_bounded(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make(running_queries=2, waiting_queries=3)
    engine.hold()
    asked = [ask(scheduler, MEMORY, view, BOAT)]
    eventually(lambda: scheduler.load().running == 1, "the first starts")
    asked += [ask(scheduler, MEMORY, view, BOAT) for _ in range(3)]
    with pytest.raises(OverloadedError):
        ask(scheduler, MEMORY, view, BOAT)
    load = scheduler.load()
    assert (load.running, load.waiting) == (1, 3)
    engine.let_go()
    for one in asked:
        assert one.sink.wait().error is None
    assert max(size for _, size in engine.calls) == 2
    assert ask(scheduler, MEMORY, view, BOAT).sink.wait().error is None


def test_a_job_being_paged_in_holds_a_place(make: Make, view: InMemoryView) -> None:
    scheduler = make(waiting_queries=1)
    job = QueryJob(MEMORY, sink := ListSink(), request=Generate(BOAT, 0))
    scheduler.admit(job)
    with pytest.raises(OverloadedError):
        ask(scheduler, MEMORY, view, BOAT)
    scheduler.stop_job(job, InterruptedQueryError("page-in failed"))
    assert sink.ends == 1
    given_back: list[int] = []
    scheduler.queue(job, view, lambda: given_back.append(1))
    assert given_back == [1], "its view came too late"
    assert ask(scheduler, MEMORY, view, BOAT).sink.wait().error is None


def test_a_stopped_query_leaves_at_its_next_step(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make()
    engine.hold()
    leaving, staying = (ask(scheduler, MEMORY, view, BOAT) for _ in range(2))
    engine.go(3)
    scheduler.stop_job(leaving.job, InterruptedQueryError("gone"))
    engine.go(2)  # The step under way, and the next.
    assert engine.calls[-1] == ("step", 1)
    assert isinstance(leaving.sink.wait().error, InterruptedQueryError)
    assert leaving.released == [True]
    engine.let_go()
    assert staying.sink.wait().text() == TEXTS[1]


def test_a_deadline_ends_a_query_at_its_next_step(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make(running_queries=1)
    engine.hold()
    running = ask(scheduler, MEMORY, view, BOAT, deadline=time.monotonic() + 0.05)
    waiting = ask(scheduler, MEMORY, view, BOAT, deadline=time.monotonic() + 0.05)
    engine.go(1)
    time.sleep(0.06)
    engine.let_go()
    for late in (running, waiting):
        assert isinstance(late.sink.wait().error, DeadlineError)
        assert late.released == [True]
    assert len([c for c in engine.calls if c[0] == "step"]) <= 2


def test_refusals_and_faults_end_their_job_only(
    make: Make, engine: WatchedEngine, view: InMemoryView, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = make()
    long = ask(scheduler, MEMORY, view, "word " * 2000)
    assert isinstance(long.sink.wait().error, QuestionTooLongError)
    engine.fail = RuntimeError("about the user's secret boat")
    broken = ask(scheduler, MEMORY, view, BOAT)
    error = broken.sink.wait().error
    assert isinstance(error, InternalFaultError)
    assert error.metadata["incident"] in caplog.text
    assert "secret" not in caplog.text
    engine.fail = RuntimeError("again")
    assert isinstance(encode(scheduler, MEMORY, ["a"]).sink.wait().error, InternalFaultError)
    engine.fail = RuntimeError("and again")
    assert isinstance(rank(scheduler, MEMORY, view, BOAT).sink.wait().error, InternalFaultError)
    assert broken.released == [True]
    assert ask(scheduler, MEMORY, view, BOAT).sink.wait().error is None


def test_rankings_run_between_steps(make: Make, engine: WatchedEngine, view: InMemoryView) -> None:
    scheduler = make()
    engine.hold()
    answer = ask(scheduler, MEMORY, view, BOAT)
    engine.go(2)
    rankings = [rank(scheduler, MEMORY, view, CHESS) for _ in range(3)]
    engine.let_go()
    for ranking in rankings:
        ((found,),) = [ranking.sink.wait().items]
        assert found[0].number == 2
        assert ranking.released == [True]
    assert answer.sink.wait().text() == TEXTS[1]
    kinds = [what for what, _ in engine.calls[2:9]]
    assert kinds.count("route") == 3
    assert not any(a == b == "route" for a, b in itertools.pairwise(kinds)), "one per turn"


def test_stopping_a_memory_ends_all_its_work_and_waits(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make(running_queries=2)
    engine.hold()
    mine = [ask(scheduler, MEMORY, view, BOAT) for _ in range(3)]  # One of them waits.
    mine.append(encode(scheduler, MEMORY, ["text"] * 3))
    paged = QueryJob(MEMORY, paged_sink := ListSink(), request=Generate(BOAT, 0))
    scheduler.admit(paged)
    other = ask(scheduler, key(1, OTHER_TENANT), view, BOAT)
    engine.go(2)
    eventually(lambda: engine.blocked, "a third call")
    with pytest.raises(MemoryInUseError):
        scheduler.stop_memory(TENANT, MEMORY.memory, timeout_s=0.02)
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(scheduler.stop_memory, TENANT, MEMORY.memory)
        assert engine.settled == 0, "what it is at may leave something yet"
        engine.let_go()
        stopping.result(5)
    assert engine.settled == 1
    for asked in mine:
        assert isinstance(asked.sink.error, InterruptedQueryError)
        assert asked.sink.ends == 1
    assert isinstance(paged_sink.error, InterruptedQueryError)
    assert other.sink.wait().text() == TEXTS[1]
    scheduler.stop_memory(TENANT)  # Nothing left: returns at once.


def test_draining_lets_queries_finish(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make()
    engine.hold()
    answer = ask(scheduler, MEMORY, view, BOAT)
    engine.go(2)
    work = encode(scheduler, MEMORY, ["text"] * 3)
    with ThreadPoolExecutor(1) as threads:
        draining = threads.submit(scheduler.drain, 10.0)
        eventually(lambda: scheduler._draining, "draining begins")
        with pytest.raises(DrainingError):
            ask(scheduler, MEMORY, view, BOAT)
        with pytest.raises(DrainingError):
            rank(scheduler, MEMORY, view, BOAT)
        with pytest.raises(DrainingError):
            encode(scheduler, MEMORY, ["text"])
        engine.let_go()
        draining.result(5)
    assert answer.sink.text() == TEXTS[1]
    assert isinstance(work.sink.error, DrainingError)


def test_draining_ends_what_takes_too_long(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make(running_queries=1)
    engine.hold()
    asked = [ask(scheduler, MEMORY, view, BOAT) for _ in range(2)]
    engine.go(1)
    with ThreadPoolExecutor(1) as threads:
        draining = threads.submit(scheduler.drain, 0.02)
        time.sleep(0.05)
        engine.let_go()
        draining.result(5)
    for one in asked:
        assert isinstance(one.sink.error, DrainingError)
        assert one.released == [True]


class BrokenSink(ListSink):
    """Breaks the sink's contract."""

    def put(self, item: object) -> None:
        raise RuntimeError("secret")


def test_a_fault_of_the_scheduler_itself_is_told(
    engine: WatchedEngine, view: InMemoryView, caplog: pytest.LogCaptureFixture
) -> None:
    faults: list[bool] = []
    scheduler = Scheduler(engine, on_fault=lambda: faults.append(True))
    scheduler.start()
    engine.hold()
    other = ask(scheduler, key(2), view, BOAT)
    job = QueryJob(MEMORY, sink := BrokenSink(), request=Generate(BOAT, 0))
    scheduler.admit(job)
    scheduler.queue(job, view, lambda: None)
    engine.let_go()
    assert isinstance(sink.wait().error, InternalFaultError)
    assert isinstance(other.sink.wait().error, InternalFaultError)
    eventually(lambda: faults == [True], "the worker is told once")
    with pytest.raises(DrainingError):
        ask(scheduler, MEMORY, view, BOAT)
    scheduler.drain(5)
    assert "secret" not in caplog.text


def test_an_error_of_a_shared_step_is_told_to_none_of_them(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    """One of them may be another tenant's: which document it names is not for all to know."""
    scheduler = make()
    engine.hold()
    both = [ask(scheduler, key(n), view, BOAT) for n in (1, 2)]
    engine.go(2)
    eventually(lambda: engine.blocked, "a third step")
    engine.fail = CorruptRecordError("corrupt", number="5", record="block")
    engine.let_go()
    for asked in both:
        error = asked.sink.wait().error
        assert isinstance(error, InternalFaultError)
        assert "number" not in error.metadata
    engine.fail = CorruptRecordError("corrupt", number="5", record="block")
    alone = ask(scheduler, MEMORY, view, BOAT).sink.wait().error
    assert isinstance(alone, CorruptRecordError)


def test_work_under_way_counts_as_using_the_memory(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make()
    engine.hold()
    ranking = rank(scheduler, MEMORY, view, CHESS)
    eventually(lambda: engine.blocked, "the ranking is under way")
    with pytest.raises(MemoryInUseError):
        scheduler.stop_memory(TENANT, MEMORY.memory, timeout_s=0.02)
    engine.let_go()
    ranking.sink.wait()
    scheduler.stop_memory(TENANT, MEMORY.memory)


def test_blocks_made_for_a_stopped_job_are_dropped(make: Make, engine: WatchedEngine) -> None:
    scheduler = make()
    engine.hold()
    work = encode(scheduler, MEMORY, ["ten bytes!"] * 3)
    eventually(lambda: engine.blocked, "a batch is under way")
    scheduler.stop_job(work.job, InterruptedQueryError("gone"))
    engine.let_go()
    assert isinstance(work.sink.wait().error, InterruptedQueryError)
    assert work.sink.items == []


def test_a_long_batch_keeps_no_memory_in_use(make: Make, engine: WatchedEngine) -> None:
    """An eviction gives it its time; after that what comes of it is dropped."""
    scheduler = make()
    engine.hold()
    work = encode(scheduler, MEMORY, ["ten bytes!"] * 3)
    eventually(lambda: engine.blocked, "a batch is under way")
    scheduler.stop_memory(TENANT, MEMORY.memory, timeout_s=0.02)
    assert isinstance(work.sink.wait().error, InterruptedQueryError)
    assert engine.blocked == "encode", "it goes on"
    again = encode(scheduler, MEMORY, ["more"])
    engine.let_go()
    assert again.sink.wait().error is None
    assert work.sink.items == []
    assert [item.number for item in again.sink.items] == [1]


def test_a_batch_that_ends_in_time_is_waited_for(make: Make, engine: WatchedEngine) -> None:
    scheduler = make()
    engine.hold()
    work = encode(scheduler, MEMORY, ["ten bytes!"] * 3)
    eventually(lambda: engine.blocked, "a batch is under way")
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(scheduler.stop_memory, TENANT, MEMORY.memory, 60.0)
        eventually(lambda: work.job.stopping is not None, "it is told to stop")
        assert work.sink.error is None
        engine.let_go()
        stopping.result(10)
    assert work.sink.ends == 1
    assert engine.calls == [("encode", 1)]


def test_what_waits_behind_another_memory_s_batch_is_ended_at_once(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    """Queries that wait or run, and batches that wait: the engine is at none of them."""
    scheduler = make(running_queries=1, long_document_patience_s=0)
    engine.hold()
    running = ask(scheduler, MEMORY, view, BOAT)
    engine.go(1)
    eventually(lambda: engine.blocked, "a second step")
    waiting = ask(scheduler, MEMORY, view, BOAT)
    other = encode(scheduler, key(1, OTHER_TENANT), ["of another tenant"])
    mine = encode(scheduler, MEMORY, ["text"])
    while engine.blocked != "encode":
        assert len(engine.calls) < 50, "encoding gets its share"
        engine.go(1)
        eventually(lambda: engine.blocked, "the next call")
    scheduler.stop_memory(TENANT, timeout_s=0)
    for asked in (running, waiting, mine):
        assert isinstance(asked.sink.wait().error, InterruptedQueryError)
    assert running.released == waiting.released == [True]
    engine.let_go()
    assert other.sink.wait().error is None
