"""An endpoint of a worker that runs apart, a real one: what it must tell, what it survives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from memsvc.workers.endpoint import RemoteEndpoint
from storage.catalog import CatalogUnavailableError
from tests.support.live_worker import WorkerProcess, connected

TENANT, MEMORY = "0a" * 16, "0b" * 16


async def test_a_worker_forgets_what_it_may_have_missed_and_outlives_an_outage(
    tmp_path: Path,
) -> None:
    """It held a memory while nobody could tell it of deletions; the catalog fails when it is
    announced first."""
    worker = await asyncio.to_thread(WorkerProcess, tmp_path)
    announced: list[int] = []
    done = asyncio.Event()
    try:
        async with connected(worker) as client:
            await client.fill(TENANT, MEMORY, ["Anna bought a boat"])
            await client.answer(client.ref(TENANT, MEMORY, 1), "boat")
            assert (await client.quiet()).resident_memories == 1

            async def announce(*_: Any) -> None:
                announced.append((await client.quiet()).resident_memories)
                if len(announced) == 1:
                    raise CatalogUnavailableError("away for a moment")
                done.set()

            endpoint = RemoteEndpoint(worker.address, announce, lambda _: None)
            running = asyncio.create_task(endpoint.run())
            async with asyncio.timeout(30):
                await done.wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert announced == [0, 0]
    finally:
        assert await asyncio.to_thread(worker.stop) == 0
