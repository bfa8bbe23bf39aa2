"""Tenants take turns in the worker, and none can take every place."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from model_adapter.engine import Generate
from model_adapter.errors import OverloadedError
from model_adapter.jobs import QueryJob, RouteJob
from model_adapter.msa.memory import InMemoryView
from model_adapter.turns import SHARE, Line, has_room
from tests.support.jobs import BOAT, MEMORY, ListSink, Make, WatchedEngine, ask, eventually, rank
from tests.support.pages import key


def query(tenant: str) -> QueryJob:
    return QueryJob(key(1, tenant), ListSink(), request=Generate("what?", 0))


def ranking(tenant: str) -> RouteJob:
    return RouteJob(key(1, tenant), ListSink(), question="what?", limit=1)


def line_of(*jobs: QueryJob | RouteJob) -> Line:
    line = Line()
    for job in jobs:
        line.add(job)
    return line


def tenants(jobs: Sequence[QueryJob | RouteJob]) -> str:
    return "".join(job.memory.tenant for job in jobs)


def test_the_tenant_with_the_fewest_running_goes_first() -> None:
    line = line_of(*[query("a") for _ in range(6)], query("b"), query("c"))
    assert tenants(line.take([query("a"), query("b")], 6)) == "caba"


def test_a_tenant_alone_leaves_a_place_to_a_newcomer() -> None:
    line = line_of(*[query("a") for _ in range(20)])
    running = line.take([], 8)
    assert len(running) == 7
    line.add(query("b"))
    assert tenants(line.take([job for job in running if isinstance(job, QueryJob)], 8)) == "b"


def test_within_a_tenant_whoever_came_first() -> None:
    jobs = [query("a") for _ in range(5)]
    assert line_of(*jobs).take([], 4) == jobs[:4]


def test_one_ranking_at_a_time_tenants_in_turn() -> None:
    line = line_of(*[ranking("a") for _ in range(9)], ranking("b"), ranking("c"))
    seen = "".join(tenants(line.take([], 8)) for _ in range(6))
    assert seen == "abcaaa"


def test_rankings_hold_up_no_other_tenants_questions() -> None:
    line = line_of(ranking("a"), ranking("a"), query("a"), query("b"))
    assert sorted(tenants(line.take([], 8))) == ["a", "b"]
    assert tenants(line.take([], 8)) == "aa"


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 9))
def test_everyone_starts_in_the_end_and_nothing_is_remembered(
    waiting: list[str], places: int
) -> None:
    jobs = [query(tenant) for tenant in waiting]
    line = line_of(*jobs)
    started: list[QueryJob | RouteJob] = []
    while len(line):
        taken = line.take([], places)
        assert 1 <= len(taken) <= places
        started += taken
    assert sorted(map(id, started)) == sorted(map(id, jobs))
    line.take([], places)
    assert not line._served


@given(st.integers(1, 500))
def test_a_flood_leaves_room(places: int) -> None:
    held = 0
    while has_room(places, held, held):
        held += 1
    assert held == places or held >= places * SHARE // (SHARE + 1)
    if places > SHARE:
        assert has_room(places, held, 0)


def test_a_flood_of_one_tenant_does_not_keep_another_waiting(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    """The newcomer joins the very next step, before all that wait."""
    scheduler = make(running_queries=8, waiting_queries=64)
    engine.hold()
    flood = [ask(scheduler, MEMORY, view, BOAT)]
    eventually(lambda: engine.blocked, "the first step begins")
    while True:
        try:
            flood.append(ask(scheduler, MEMORY, view, BOAT))
        except OverloadedError:
            break
    assert 50 < len(flood) < 60
    late = ask(scheduler, key(1, "b0" * 16), view, BOAT)
    engine.go(1)
    eventually(lambda: engine.blocked and late.job.started_at > 0, "it starts with the next step")
    assert sum(asked.job.started_at > 0 for asked in flood) <= 7
    engine.let_go()
    for asked in (late, *flood):
        assert asked.sink.wait().error is None


def test_a_flood_of_rankings_does_not_keep_another_waiting(
    make: Make, engine: WatchedEngine, view: InMemoryView
) -> None:
    scheduler = make()
    engine.hold()
    flood = [rank(scheduler, MEMORY, view, BOAT) for _ in range(10)]
    eventually(lambda: engine.blocked, "the first begins")
    late = rank(scheduler, key(1, "b0" * 16), view, BOAT)
    engine.go(2)
    eventually(lambda: late.sink.ends == 1 or engine.blocked, "the second begins")
    assert sum(asked.sink.ends for asked in flood) <= 1
    engine.let_go()
    for asked in (late, *flood):
        assert asked.sink.wait().error is None
