"""A watched engine, a memory for it, and schedulers that are drained in the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model_adapter.limits import Limits
from model_adapter.msa.memory import InMemoryView
from model_adapter.pacing import EncodeShare
from model_adapter.scheduler import Scheduler
from tests.support.jobs import Make, WatchedEngine, make_view


@pytest.fixture
def engine() -> WatchedEngine:
    return WatchedEngine()


@pytest.fixture
def view(engine: WatchedEngine) -> InMemoryView:
    return make_view(engine.inner)


@pytest.fixture
def make(engine: WatchedEngine) -> Iterator[Make]:
    made: list[Scheduler] = []

    def start(share: EncodeShare | None = None, **limits: float) -> Scheduler:
        bounds = Limits(**limits)  # type: ignore[arg-type]  # by name
        scheduler = Scheduler(
            engine,
            bounds,
            share or EncodeShare(smallest_batch_bytes=1, largest_batch_bytes=10),
            clock=engine.clock,
        )
        scheduler.start()
        made.append(scheduler)
        return scheduler

    yield start
    if engine._held is not None:
        engine.let_go()
    for scheduler in made:
        scheduler.drain(0)
