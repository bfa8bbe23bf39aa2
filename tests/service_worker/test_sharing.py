"""Several workers of one model: memories are shared among them, and move when one leaves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc.workers.placement import place
from memsvc.workers.supervisor import WorkerProcess
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually, worker_apart

ADDRESSES = ["unix:/a", "unix:/b", "host:1", "host:2", "host:3"]


# --- the rule -----------------------------------------------------------------------


@given(st.text("0123456789abcdef", min_size=32, max_size=32), st.sampled_from(ADDRESSES))
def test_only_the_memories_of_a_worker_that_leaves_move(memory_uid: str, leaver: str) -> None:
    before = place(memory_uid, ADDRESSES)
    after = place(memory_uid, [address for address in ADDRESSES if address != leaver])
    assert (before == after) == (before != leaver)
    assert place(memory_uid, reversed(ADDRESSES)) == before, "the order does not count"


def test_every_worker_gets_its_share() -> None:
    found = Counter(place(f"{number:032x}", ADDRESSES) for number in range(5000))
    assert set(found) == set(ADDRESSES)
    assert all(800 < count < 1200 for count in found.values())
    assert place("0" * 32, []) is None


# --- two workers --------------------------------------------------------------------


@asynccontextmanager
async def _two(
    start: Serve, tmp_path: Path, model: str = "fake"
) -> AsyncIterator[tuple[Asking, dict[str, WorkerProcess]]]:
    """A server with two workers, by their addresses."""
    data = tmp_path / "data"
    async with (
        worker_apart(data, tmp_path / "a", model) as one,
        worker_apart(data, tmp_path / "b", model) as two,
        start(worker_address=f"{one.address}, {two.address}") as served,
    ):
        await eventually(lambda: _serving(served, 2))
        yield served, {one.address: one, two.address: two}


async def _serving(served: Asking, workers: int) -> bool:
    return len(served.app.workers.of_model("fake")) == workers


async def _placed(served: Asking, memory: str) -> str:
    found = served.app.workers.place("fake", (await served.row(memory)).uid)
    assert found is not None
    return found.address


async def test_both_encode_and_answer(start: Serve, tmp_path: Path) -> None:
    async with _two(start, tmp_path) as (served, workers):
        memories = [(await served.create()).name for _ in range(12)]
        await asyncio.gather(*(served.append(m, f"boiler number {m}") for m in memories))
        for memory in memories:
            answer = await served.ask(memory, "boiler")
            assert answer.cited == [1] and memory in answer.text
        places = {memory: await _placed(served, memory) for memory in memories}
        assert set(places.values()) == set(workers)
        for endpoint in served.app.workers.of_model("fake"):
            held = (await endpoint.client.info(5)).residency.resident_memories
            assert held == list(places.values()).count(endpoint.address)


async def test_the_memories_of_a_dead_worker_go_to_the_other(start: Serve, tmp_path: Path) -> None:
    async with _two(start, tmp_path) as (served, workers):
        memories = [(await served.create()).name for _ in range(6)]
        for memory in memories:
            await served.append(memory, "Olga repaired the boiler")
            await served.ready(memory)
        dead = await _placed(served, memories[0])
        os.kill(workers[dead].pid, signal.SIGKILL)
        # Its death is not known yet: the call finds out and asks the other.
        for memory in memories:
            assert (await served.ask(memory, "boiler")).cited == [1]
        await eventually(lambda: _serving(served, 1))
        for memory in memories:
            await served.append(memory, "The boiler is new")
            assert (await served.ask(memory, "new boiler")).cited == [2]
            assert await _placed(served, memory) != dead


async def test_one_that_drains_finishes_and_gets_nothing_new(start: Serve, tmp_path: Path) -> None:
    async with _two(start, tmp_path, "fake:step_ms=30") as (served, workers):
        memory = (await served.create()).name
        await served.append(memory, "boiler " + "word " * 120)
        await served.ready(memory)
        draining = await _placed(served, memory)
        running = asyncio.create_task(served.ask(memory, "boiler"))
        await eventually(lambda: _runs(served, draining))
        os.kill(workers[draining].pid, signal.SIGTERM)

        async def moved() -> bool:
            """The first to ask may reach it before it has noticed."""
            second = await served.ask(memory, "boiler", options={"max_answer_tokens": 2})
            assert second.cited == [1]
            return await _placed(served, memory) != draining

        await eventually(moved)
        assert psutil.pid_exists(workers[draining].pid) and not running.done()
        assert len((await running).text.split()) > 120


async def _runs(served: Asking, address: str) -> bool:
    for worker in served.app.workers.of_model("fake"):
        if worker.address == address:
            return (await worker.client.info(5)).residency.running_queries > 0
    return False


async def test_a_worker_of_another_identity_is_kept_out(
    start: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    late = f"unix:{tmp_path}/b/worker.sock"
    async with (
        worker_apart(data, tmp_path / "a") as one,
        start(worker_address=f"{one.address},{late}") as served,
    ):
        memory = await served.create()
        await served.append(memory.name, "a boiler")
        assert (await served.ask(memory.name, "boiler")).cited == [1]
        async with worker_apart(data, tmp_path / "b", "fake:pool_tokens=8") as two:
            assert two.address == late
            await eventually(lambda: _refusals(caplog))
            assert [w.address for w in served.app.workers.of_model("fake")] == [one.address]
            assert (await served.ask(memory.name, "boiler")).cited == [1]
            # The last of the old identity leaves: the new one takes over and encodes afresh.
            await one.stop()
            await eventually(lambda: _served_from(served, late))
            assert (await served.ask(memory.name, "boiler")).cited == [1]


async def _refusals(caplog: pytest.LogCaptureFixture) -> bool:
    return "all its workers must be of one" in caplog.text


async def _served_from(served: Asking, address: str) -> bool:
    found = served.app.workers.find("fake")
    return found is not None and found.address == address
