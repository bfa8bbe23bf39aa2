"""Blocks are found damaged, and made again, while a batch of the memory is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from memsvc.workers import ServedModel, Workers
from tests.service_worker.conftest import Serve
from tests.support.answers import eventually, worker_apart
from tests.support.broken_workers import Front, worker_behind

#: Blocks that the server writes at once.
_GROUP = 32


class Hesitant(Front):
    """Says the end of a long batch when it is let."""

    let: ClassVar[asyncio.Event]

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        replies = [reply async for reply in super().Encode(request, context)]
        for reply in replies[:_GROUP]:
            yield reply
        if len(replies) > _GROUP:
            await self.let.wait()
        for reply in replies[_GROUP:]:
            yield reply


async def test_no_watermark_passes_blocks_that_are_to_be_made_again(
    start: Serve, tmp_path: Path
) -> None:
    Hesitant.let = asyncio.Event()
    async with (
        worker_apart(tmp_path / "data", tmp_path / "apart") as worker,
        worker_behind(Hesitant, worker.address, tmp_path) as address,
        start(worker_address=address) as served,
    ):
        memory = await served.create()
        await served.append(memory.name, *(f"text {n}" for n in range(1, 5)))
        await served.ready(memory.name)
        row = await served.row(memory.name)
        model = await served.app.catalog.get_model("fake")
        await served.append(memory.name, *(f"text {n}" for n in range(5, 45)))

        async def group_is_written() -> bool:
            return len(await served.blocks(row)) == 4 + _GROUP

        await eventually(group_is_written)
        await served.app.encoding.rebuild(row, model, [3])
        await served.delete_documents(memory.name, 5, 6)
        Hesitant.let.set()
        encoding = await served.ready(memory.name)
        assert encoding.encoded_documents == 42
        row = await served.row(memory.name)
        assert await served.problems(row) == []
        assert 3 in await served.blocks(row)


class Gated(Front):
    """Encodes nothing while its gate is closed."""

    gate: ClassVar[asyncio.Event]

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.gate.wait()
        async for reply in super().Encode(request, context):
            yield reply


async def test_a_question_waits_for_blocks_that_are_made_again_since_it_came(
    start: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is answered without them, and so is every later one of the same epoch."""
    Gated.gate = asyncio.Event()
    Gated.gate.set()
    require, damaged = Workers.require, asyncio.Event()

    async with (
        worker_apart(tmp_path / "data", tmp_path / "apart") as worker,
        worker_behind(Gated, worker.address, tmp_path) as address,
        start(worker_address=address) as served,
    ):
        memory = await served.create()
        await served.append(memory.name, "Olga repaired the boiler", "tea")
        await served.ready(memory.name)
        row = await served.row(memory.name)
        model = await served.app.catalog.get_model("fake")

        async def damage_found(workers: Workers, *arguments: Any) -> ServedModel:
            """By another question, just when this one knows that all is encoded."""
            if not damaged.is_set():
                damaged.set()
                Gated.gate.clear()
                await served.app.encoding.rebuild(row, model, [1])
                await asyncio.sleep(0.05)  # A question this old looks at the memory again.
            return await require(workers, *arguments)

        monkeypatch.setattr(Workers, "require", damage_found)
        asking = asyncio.create_task(served.ask(memory.name, "boiler?"))
        await damaged.wait()
        await asyncio.wait([asking], timeout=0.5)
        Gated.gate.set()
        assert (await asking).cited == [1]
        assert (await served.ask(memory.name, "boiler?")).cited == [1]
