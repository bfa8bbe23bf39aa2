"""What the scheduler promises, watched at the engine seam."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model_adapter.engine import DocumentText, Generate, QuestionTooLongError
from model_adapter.errors import (
    DeadlineError,
    DrainingError,
    InternalFaultError,
    InterruptedQueryError,
    MemoryInUseError,
    OverloadedError,
)
from model_adapter.fake import FakeEngine
from model_adapter.jobs import QueryJob
from model_adapter.limits import Limits
from model_adapter.msa.memory import InMemoryView
from model_adapter.pacing import EncodeShare
from model_adapter.scheduler import Scheduler
from storage.layout import KVBlock
from tests.support.jobs import (
    ListSink,
    WatchedEngine,
    ask,
    encode,
    events_alone,
    eventually,
    rank,
)
from tests.support.pages import OTHER_TENANT, TENANT, key

TEXTS = {
    1: "Anna bought a red sailing boat in Kiel last spring",
    2: "Bob plays chess with Carla every Friday evening in the library",
    3: "The garden needs water when summer turns dry",
}
BOAT, CHESS, GARDEN = "Which boat was it?", "Who plays chess?", "What about the garden?"
MEMORY = key(1)


def make_view(engine: FakeEngine) -> InMemoryView:
    encoded = engine.encode([DocumentText(number, text) for number, text in TEXTS.items()])
    return InMemoryView(engine.description.layout, encoded.blocks, TEXTS)


@pytest.fixture
def engine() -> WatchedEngine:
    return WatchedEngine()


@pytest.fixture
def view(engine: WatchedEngine) -> InMemoryView:
    return make_view(engine.inner)


#: At the watched engine's 1,000 bytes a second: 200 bytes, or 20 while queries run.
BY_TURNS = EncodeShare(
    batch_s=0.2,
    busy_batch_s=0.02,
    busy_share=1 / 6,
    smallest_batch_bytes=1,
    largest_batch_bytes=200,
)
#: One document of "ten bytes!" at a time.
SMALL = EncodeShare(smallest_batch_bytes=1, largest_batch_bytes=10)

Make = Callable[..., Scheduler]


@pytest.fixture
def make(engine: WatchedEngine) -> Iterator[Make]:
    made: list[Scheduler] = []

    def start(share: EncodeShare | None = None, **limits: float) -> Scheduler:
        bounds = Limits(**limits)  # type: ignore[arg-type]  # by name
        scheduler = Scheduler(engine, bounds, share or SMALL, clock=engine.clock)
        scheduler.start()
        made.append(scheduler)
        return scheduler

    yield start
    if engine._held is not None:
        engine.let_go()
    for scheduler in made:
        scheduler.drain(0)


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


def test_encoding_and_queries_share_by_turns(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make(BY_TURNS)
    encode(scheduler, MEMORY, ["ten bytes!"] * 400).sink.wait()  # So that the speed is known.
    engine.calls.clear()
    engine.hold()
    answers = [ask(scheduler, MEMORY, view, BOAT * 3) for _ in range(2)]
    work = encode(scheduler, MEMORY, ["ten bytes!"] * 100)
    engine.let_go()
    assert all(answer.sink.wait().error is None for answer in answers)
    assert [item.number for item in work.sink.wait().items] == list(range(1, 101))
    kinds = "".join("e" if what == "encode" else "s" for what, _ in engine.calls)
    while_running = kinds[kinds.index("s") : kinds.rindex("s") + 1]
    # 20 bytes take 0.02 s, for which queries are owed 0.1 s: one step of 0.125 s.
    assert "se" * 4 in while_running
    assert "ee" not in while_running
    sizes = [size for what, size in engine.calls if what == "encode"]
    assert set(sizes[1 : while_running.count("e")]) == {2}
    assert sizes[-2] == 20, "full batches when nothing else runs"


def test_running_queries_are_held_up_for_their_share_only(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    """A long batch is followed by steps that take as long."""
    engine.step_s, engine.seconds_per_byte = 1 / 8, 1 / 32
    scheduler = make(EncodeShare(busy_share=0.5, smallest_batch_bytes=1, largest_batch_bytes=10))
    engine.hold()
    ask(scheduler, MEMORY, view, BOAT)
    engine.go(1)
    encode(scheduler, MEMORY, ["ten bytes!"] * 100)
    engine.go(9)
    kinds = "".join("e" if what == "encode" else "s" for what, _ in engine.calls)
    assert kinds in ("ssesssesss", "sesssessse"), kinds


def test_documents_are_batched_by_length(make: Make, engine: WatchedEngine) -> None:
    share = EncodeShare(smallest_batch_bytes=1, largest_batch_bytes=100)
    texts = ["a" * length for length in (90, 10, 95, 12, 8, 70)]
    asked = encode(make(share), MEMORY, texts)
    assert [item.number for item in asked.sink.wait().items] == [5, 2, 4, 6, 1, 3]
    sizes = [size for what, size in engine.calls if what == "encode"]
    assert sizes == [4, 1, 1], "8 + 10 + 12 + 70 bytes, then each alone"


def test_encode_jobs_take_turns(make: Make, engine: WatchedEngine) -> None:
    scheduler = make()
    engine.hold()
    long = encode(scheduler, MEMORY, ["ten bytes!"] * 50)
    short = encode(scheduler, key(2), ["ten bytes!"] * 3)
    engine.go(8)
    assert short.sink.wait().error is None
    assert not long.sink.ends
    engine.let_go()
    assert len(long.sink.wait().items) == 50


def test_a_slow_reader_holds_back_its_own_job_only(make: Make, engine: WatchedEngine) -> None:
    scheduler = make()
    engine.hold()
    slow = encode(scheduler, MEMORY, ["ten bytes!"] * 5)
    engine.go(1)
    slow.sink.open = False
    quick = encode(scheduler, key(2), ["ten bytes!"] * 5)
    engine.let_go()
    assert len(quick.sink.wait().items) == 5
    held = len(slow.sink.items)
    assert held < 5
    time.sleep(0.05)
    assert len(slow.sink.items) == held
    slow.sink.open = True
    scheduler.wake()
    assert len(slow.sink.wait().items) == 5


def test_a_long_document_waits_for_a_quiet_turn_but_not_for_ever(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make(long_document_patience_s=0.3)
    engine.hold()
    ask(scheduler, MEMORY, view, BOAT)
    long = encode(scheduler, MEMORY, ["far more than four batches of ten bytes each"])
    engine.go(5)
    assert {what for what, _ in engine.calls} == {"step"}
    time.sleep(0.3)
    engine.go(2)
    assert ("encode", 1) in engine.calls[-2:]
    engine.let_go()
    assert long.sink.wait().error is None


def test_waiting_encodes_are_bounded(make: Make, engine: WatchedEngine) -> None:
    scheduler = make(encode_jobs=3, encode_bytes=100)
    engine.hold()
    first = encode(scheduler, MEMORY, ["x" * 500])  # Alone it is always taken.
    eventually(lambda: not scheduler._encoding, "the first is at work")
    waiting = encode(scheduler, MEMORY, ["y" * 60])
    with pytest.raises(OverloadedError):
        encode(scheduler, MEMORY, ["z" * 60])
    more = [encode(scheduler, MEMORY, ["z"]) for _ in range(2)]
    with pytest.raises(OverloadedError):
        encode(scheduler, MEMORY, ["z"])
    engine.let_go()
    for asked in (first, waiting, *more):
        assert asked.sink.wait().error is None


def test_failures_of_documents_are_results(make: Make, engine: WatchedEngine) -> None:
    texts = ["short", "word " * 300_000, "short too"]
    items = encode(make(), MEMORY, texts).sink.wait().items
    blocks = {item.number for item in items if isinstance(item, KVBlock)}
    failures = {i.number: i.error.reason for i in items if not isinstance(i, KVBlock)}
    assert (blocks, failures) == ({1, 3}, {2: "DOCUMENT_TOO_LONG"})


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
        engine.let_go()
        stopping.result(5)
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
