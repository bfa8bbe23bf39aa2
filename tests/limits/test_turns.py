"""Whose call is worked on next. The clock is the test's; nothing depends on how fast it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from memsvc.limits import Refusals, Turns
from memsvc.limits.refusals import BURST, LONGEST_S, PER_S


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Calls of some tenants, each of which takes its time when told to."""

    def __init__(self, places: int = 8, share: float = 0.0) -> None:
        self.clock = Clock()
        self.turns = Turns(places, share, self.clock)
        self.begun: list[str] = []
        self._inside: list[tuple[str, asyncio.Event]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def call(self, tenant: str) -> asyncio.Task[None]:
        async def run() -> None:
            async with self.turns.turn(tenant):
                self.begun.append(tenant)
                over = asyncio.Event()
                self._inside.append((tenant, over))
                await over.wait()

        task = asyncio.create_task(run())
        self._tasks.append(task)
        return task

    def inside(self, tenant: str) -> int:
        return sum(one == tenant for one, _ in self._inside)

    async def end(self, tenant: str, seconds: float = 0.0) -> None:
        """The tenant's oldest call ends, having taken so long."""
        self.clock.now += seconds
        number = next(n for n, (one, _) in enumerate(self._inside) if one == tenant)
        self._inside.pop(number)[1].set()
        await settle()

    async def over(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)


async def test_a_tenant_alone_leaves_a_place_free() -> None:
    work = Work(places=5)
    for _ in range(20):
        work.call("a")
    await settle()
    assert work.inside("a") == 4
    assert work.turns.waiting == 16
    work.call("b")
    await settle()
    assert work.inside("b") == 1
    await work.over()


async def test_tenants_take_turns_whoever_sent_more() -> None:
    work = Work(places=5)
    for _ in range(10):
        work.call("a")
    await settle()
    for tenant in "bcbc":
        work.call(tenant)
    await settle()
    for _ in range(4):
        await work.end(work.begun[-1])
    assert work.begun[:4] == ["a"] * 4
    assert work.begun[4:8] == ["b", "c", "b", "c"]
    await work.over()


async def test_alone_a_tenant_is_not_held_back() -> None:
    work = Work(share=0.5)
    for _ in range(50):
        work.call("a")
        await settle()
        await work.end("a", seconds=1.0)
    assert len(work.begun) == 50
    await work.over()


async def test_a_flood_waits_while_a_lighter_tenant_is_about() -> None:
    work = Work(share=0.5)
    for _ in range(40):
        work.call("a")
    work.call("b")
    await settle()
    assert work.inside("b") == 1
    while work.inside("a"):
        await work.end("a", seconds=0.1)
    # More work than its share was done; nothing of it begins, however many places are free.
    assert work.turns.waiting
    begun = len(work.begun)
    work.call("b")
    await settle()
    assert work.begun[begun:] == ["b"]
    await work.end("b")
    work.clock.now += 0.9
    await until(lambda: len(work.begun) == begun + 2)
    assert work.begun[-1] == "a"
    await work.over()


async def test_near_its_share_a_flood_has_one_call_worked_on_beside_a_lighter_tenant() -> None:
    work = Work(share=0.5)
    for _ in range(4):
        work.call("a")
    await settle()
    # Nobody else is about.
    assert work.inside("a") == 4
    work.call("b")
    await settle()
    for _ in range(4):
        await work.end("a", seconds=0.01)
    assert work.inside("b") == 1
    # It is above half of its share by now, and below the whole of it.
    for _ in range(4):
        work.call("a")
    await settle()
    assert work.inside("a") == 1
    await work.end("a")
    assert work.inside("a") == 1
    # One that takes long is not waited for to its end.
    work.clock.now += 0.05
    await until(lambda: work.inside("a") == 2)
    await work.over()


async def test_a_flood_goes_on_between_the_calls_of_a_lighter_tenant() -> None:
    work = Work(share=0.5)
    step = await beside_a_lighter_ones_call(work)
    await work.end("b", seconds=0.001)
    assert (work.inside("a"), step.done()) == (1, True)
    await work.over()


async def test_a_flood_waits_for_a_lighter_tenants_call_no_longer_than_for_its_own() -> None:
    work = Work(share=0.5)
    step = await beside_a_lighter_ones_call(work)
    work.clock.now += 0.026
    await until(lambda: step.done() and work.inside("a") == 1)
    assert work.inside("b") == 1
    await work.over()


async def test_nobody_else_waits_between_two_steps() -> None:
    work = Work(share=0.5)
    await near_its_share(work)
    await asyncio.wait_for(work.turns.step("a"), 1)  # No call of a lighter one is worked on.
    work.call("a")
    await settle()
    for tenant in ("b", "never seen"):
        await asyncio.wait_for(work.turns.step(tenant), 1)
    await work.over()


async def beside_a_lighter_ones_call(work: Work) -> asyncio.Task[None]:
    """A call of b is worked on; the next call of a and its next step, returned, wait for it."""
    await near_its_share(work)
    work.call("b")
    await settle()
    work.call("a")
    step = asyncio.create_task(work.turns.step("a"))
    await settle()
    assert (work.inside("a"), step.done()) == (0, False)
    return step


async def near_its_share(work: Work) -> None:
    """Tenant a has done more than half of its share, b next to nothing; nothing is under way."""
    work.call("b")
    await settle()
    await work.end("b", seconds=0.001)
    for _ in range(4):
        work.call("a")
        await settle()
        await work.end("a", seconds=0.02)
    assert 0.25 < work.turns._tenants["a"].use(work.clock.now) < 0.5


async def test_its_share_is_what_a_flood_gets() -> None:
    work = Work(share=0.5)
    for _ in range(1000):
        work.call("a")
    work.call("b")
    await settle()
    started = work.clock.now
    while work.clock.now < started + 20:
        work.clock.now += 0.01
        while work.inside("a"):
            await work.end("a")
        if not work.inside("b"):
            work.call("b")
        work.turns._advance()
        await settle()
    # Each took 10 ms: half of the time is 50 a second.
    assert 900 < work.begun.count("a") + 10 <= 1010
    await work.over()


async def test_work_in_a_thread_counts_too() -> None:
    work = Work(share=0.5)
    await work.turns.worked("a", 10.0)  # Alone: nobody is in its way.
    work.call("b")
    await settle()
    waiting = asyncio.create_task(work.turns.worked("a", 0.5))
    work.call("a")
    await settle()
    assert (waiting.done(), work.inside("a"), work.inside("b")) == (False, 0, 1)
    work.clock.now += 1.2
    await until(lambda: waiting.done() and work.inside("a") == 1)
    await work.over()


async def test_when_the_others_have_left_a_flood_has_everything() -> None:
    work = Work(places=5, share=0.5)
    work.call("b")
    for _ in range(30):
        work.call("a")
    await settle()
    await work.end("b")
    while work.inside("a"):
        await work.end("a", seconds=0.05)
    assert work.turns.waiting
    work.clock.now += 1.5
    await until(lambda: work.inside("a") == 4)
    await work.over()


async def test_who_leaves_while_waiting_costs_nothing() -> None:
    work = Work(places=5)
    for _ in range(3):
        work.call("a")
    first, second, third = (work.call("a") for _ in range(3))
    await settle()
    second.cancel()
    await settle()
    await work.end("a")
    assert (first.done(), second.cancelled(), third.done()) == (False, True, False)
    assert (work.inside("a"), work.turns.waiting) == (4, 0)
    work.call("a").cancel()
    fourth = work.call("a")
    await settle()
    fourth.cancel()
    await settle()
    assert work.turns.waiting == 0
    await work.end("a")
    work.call("a")
    await settle()
    assert work.begun == ["a"] * 6
    await work.over()


async def test_a_place_given_in_the_moment_its_caller_leaves_is_given_on() -> None:
    work = Work(places=5)
    for _ in range(4):
        work.call("a")
    await settle()
    second, _ = work.call("a"), work.call("a")
    await settle()
    _, over = work._inside.pop(0)
    over.set()
    # One step: the first has ended, the second has its place and does not know it yet.
    await asyncio.sleep(0)
    assert work.turns.waiting == 1
    second.cancel()
    await settle()
    assert (work.inside("a"), work.turns.waiting) == (4, 0)
    await work.over()


async def test_tenants_that_left_are_forgotten() -> None:
    work = Work(share=0.5)
    for number in range(200):
        work.call(f"t{number}")
        await settle()
        await work.end(f"t{number}")
        work.clock.now += 0.5
    assert len(work.turns._tenants) < 5


def test_the_first_refusals_are_told_at_once_and_then_at_a_steady_rate() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    delays = [refusals.delay_s("a") for _ in range(BURST + 3)]
    assert not any(delays[:BURST])
    assert delays[BURST:] == [pytest.approx(n / PER_S, abs=1e-6) for n in (1, 2, 3)]
    assert refusals.delay_s("b") == 0
    for _ in range(1000):
        assert refusals.delay_s("a") <= LONGEST_S
    clock.now += LONGEST_S + BURST / PER_S
    assert refusals.delay_s("a") == 0


async def test_who_is_held_leaves_with_its_caller() -> None:
    refusals = Refusals()
    for _ in range(1000):
        refusals.delay_s("a")
    held = asyncio.create_task(refusals.hold("a"))
    await settle()
    assert refusals._held == 1
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    assert refusals._held == 0
