"""The clock jumps while memories are written and asked: order, retries and waits stay right."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import pytest

from memsvc.clock import SteadyClock
from memsvc.housekeeping import keep_house_once
from tests.service_worker.conftest import Serve
from tests.support.served import refused

_DAY_S = 86_400.0
_YEAR_S = 365 * _DAY_S


@dataclass
class Wall:
    """The `time` that memsvc's modules see, whose wall clock a test sets.

    gRPC keeps the real one: it turns a deadline into monotonic time in its own library.
    """

    ahead_s: float = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def time_ns(self) -> int:
        return time.time_ns() + round(self.ahead_s * 1e9)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    made = Wall()
    patched = 0
    for name, module in list(sys.modules.items()):
        if name.startswith(("memsvc", "storage")) and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", made)
            patched += 1
    assert patched >= 5
    return made


async def test_a_memory_under_a_jumping_clock(start: Serve, wall: Wall) -> None:
    async with start() as served:
        memory = await served.create("jumps")
        revisions: list[int] = []
        written: list[str] = []
        for number, ahead_s in enumerate((0.0, _YEAR_S, -_YEAR_S, 3600.0, -5.0, _DAY_S), start=1):
            wall.ahead_s = ahead_s
            reply = await served.append(memory.name, f"fact {number} about boilers")
            revisions.append(reply.revision)
            written += reply.documents
            answer = await served.ask(
                memory.name, f"fact {number}", at_least_revision=reply.revision
            )
            assert answer.done is not None and answer.done.revision >= reply.revision
        assert revisions == [1, 2, 3, 4, 5, 6]
        assert written == [f"{memory.name}/documents/{n}" for n in range(1, 7)]
        assert await served.texts(memory.name) == [f"fact {n} about boilers" for n in range(1, 7)]
        await served.delete_documents(memory.name, 2, 3)
        assert (await served.ready(memory.name)).encoded_documents == 4
        assert await served.problems(await served.row(memory.name)) == []


async def test_a_clock_set_forwards_does_not_make_a_retry_append_twice(
    start: Serve, wall: Wall
) -> None:
    async with start() as served:
        memory = await served.create("retries")
        clock = SteadyClock(wall.time)
        first = await served.append(memory.name, "once", request_id="r1")
        wall.ahead_s = 30 * _DAY_S
        await keep_house_once(served.app, clock)
        assert await served.append(memory.name, "once", request_id="r1") == first
        assert await served.texts(memory.name) == ["once"]
        other = await refused(served.append(memory.name, "other", request_id="r1"))
        assert other.reason == "REQUEST_ID_REUSED"


async def test_what_is_old_is_forgotten_all_the_same(start: Serve, wall: Wall) -> None:
    async with start() as served:
        memory = await served.create("forgets")
        wall.ahead_s = -2 * _DAY_S
        await served.append(memory.name, "twice", request_id="r1")
        wall.ahead_s = 0.0
        await keep_house_once(served.app, SteadyClock(wall.time))
        await served.append(memory.name, "twice", request_id="r1")
        assert await served.texts(memory.name) == ["twice", "twice"]


def test_steady_time() -> None:
    now = {"wall": 1000.0, "monotonic": 5.0}
    clock = SteadyClock(lambda: now["wall"], lambda: now["monotonic"])
    assert clock.now_s() == 1000.0
    now.update(wall=1010.0, monotonic=15.0)
    assert clock.now_s() == 1010.0
    now.update(wall=9999.0, monotonic=16.0)
    assert clock.now_s() == 1011.0
    now.update(wall=500.0, monotonic=17.0)
    assert clock.now_s() == 500.0
