"""Many who ask the same at once share a look, and never one that began before they asked."""

from __future__ import annotations

import asyncio

import pytest

from memsvc.encoding.looks import Looks


class Counted:
    """A look that ends when it is told to, and says the how-manyeth it is."""

    def __init__(self) -> None:
        self.begun = 0
        self.begins = asyncio.Semaphore(0)
        self.may_end = asyncio.Event()

    async def look(self, key: str) -> tuple[str, int]:
        self.begun += 1
        mine = self.begun
        self.begins.release()
        await self.may_end.wait()
        return key, mine


async def test_whoever_comes_while_one_runs_shares_the_next() -> None:
    counted = Counted()
    looks = Looks(counted.look)
    first = asyncio.create_task(looks.fresh("a"))
    await counted.begins.acquire()
    later = [asyncio.create_task(looks.fresh("a")) for _ in range(100)]
    await asyncio.sleep(0)
    counted.may_end.set()
    assert await first == ("a", 1)
    assert set(await asyncio.gather(*later)) == {("a", 2)}
    assert counted.begun == 2


async def test_keys_do_not_wait_for_each_other() -> None:
    counted = Counted()
    looks = Looks(counted.look)
    both = [asyncio.create_task(looks.fresh(key)) for key in ("a", "b")]
    await counted.begins.acquire()
    await counted.begins.acquire()
    counted.may_end.set()
    assert [key for key, _ in await asyncio.gather(*both)] == ["a", "b"]


async def test_one_that_leaves_takes_nothing_away() -> None:
    counted = Counted()
    looks = Looks(counted.look)
    leaving, staying = (asyncio.create_task(looks.fresh("a")) for _ in range(2))
    await counted.begins.acquire()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    counted.may_end.set()
    assert await staying == ("a", 1)


async def test_a_failure_is_told_to_all_and_is_not_the_end() -> None:
    failures = [OSError("no"), OSError("no")]

    async def look(_: str) -> int:
        if failures:
            raise failures.pop()
        return 1

    looks = Looks(look)
    told = await asyncio.gather(*(looks.fresh("a") for _ in range(3)), return_exceptions=True)
    assert [type(one) for one in told] == [OSError] * 3
    with pytest.raises(OSError, match="no"):
        await looks.fresh("a")
    assert await looks.fresh("a") == 1
