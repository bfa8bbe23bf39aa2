from __future__ import annotations

import asyncio

import pytest

from memsvc.locks import MemoryLocks

KEY = ("tenant", "memory")


async def test_one_at_a_time_in_order_and_nothing_left() -> None:
    locks = MemoryLocks()
    order: list[int] = []

    async def work(number: int) -> int:
        async def inner() -> int:
            order.append(number)
            await asyncio.sleep(0)
            assert order[-1] == number
            return number

        return await locks.run_whole(*KEY, inner)

    assert await asyncio.gather(*map(work, range(10))) == list(range(10))
    assert order == list(range(10))
    assert not locks._locks
    assert not locks._users


async def test_memories_do_not_wait_for_each_other() -> None:
    locks = MemoryLocks()
    async with (
        asyncio.timeout(1),
        locks.exclusive("tenant", "one"),
        locks.exclusive("tenant", "two"),
        locks.exclusive("other", "one"),
    ):
        pass


async def test_a_waiter_that_is_cancelled_never_runs() -> None:
    locks = MemoryLocks()
    ran = False

    async def work() -> None:
        nonlocal ran
        ran = True

    async with locks.exclusive(*KEY):
        waiting = asyncio.create_task(locks.run_whole(*KEY, work))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await locks.drain()
    assert not ran
    assert not locks._locks


async def test_work_that_began_outlives_its_caller_and_keeps_the_lock() -> None:
    locks = MemoryLocks()
    began, go_on = asyncio.Event(), asyncio.Event()
    done = False

    async def work() -> None:
        nonlocal done
        began.set()
        await go_on.wait()
        done = True

    caller = asyncio.create_task(locks.run_whole(*KEY, work))
    await began.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02), locks.exclusive(*KEY):
            pass
    go_on.set()
    await locks.drain()
    assert done
    async with locks.exclusive(*KEY):
        pass


async def test_errors_come_through_and_free_the_lock() -> None:
    locks = MemoryLocks()

    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await locks.run_whole(*KEY, fail)
    assert not locks._locks
