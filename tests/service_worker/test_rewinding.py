"""Blocks are found damaged, and made again, while a batch of the memory is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

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
