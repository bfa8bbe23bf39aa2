"""How encoding and queries share the engine, watched at its seam."""

from __future__ import annotations

import time

import pytest

from model_adapter.errors import (
    OverloadedError,
)
from model_adapter.msa.memory import InMemoryView
from model_adapter.pacing import EncodeShare
from storage.layout import KVBlock
from tests.support.jobs import (
    BOAT,
    MEMORY,
    Make,
    WatchedEngine,
    ask,
    encode,
    eventually,
)
from tests.support.pages import key

#: At the watched engine's 1,000 bytes a second: 200 bytes, or 20 while queries run.
BY_TURNS = EncodeShare(
    batch_s=0.2,
    busy_batch_s=0.02,
    busy_share=1 / 6,
    asked_s=0.1,
    smallest_batch_bytes=1,
    largest_batch_bytes=200,
)


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
    # For 0.1 s after the last step another query may be near; five batches take as long.
    small = while_running.count("e") + 5
    assert set(sizes[1:small]) == {2}
    assert sizes[small + 1 : -1] == [20] * len(sizes[small + 1 : -1])
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
