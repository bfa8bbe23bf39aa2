"""Which failures of a batch are held against its documents, and which are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

from grpc_status import rpc_status

from memsvc.encoding.plan import MAX_STRIKES
from model_adapter.engine import EngineError
from model_adapter.errors import DrainingError, OverloadedError
from model_adapter.status import status_of
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually, worker_apart
from tests.support.broken_workers import Front, worker_behind


async def test_an_eviction_is_not(start: Serve) -> None:
    """Deletions evict, and a memory may be deleted from as often as it is appended to."""
    async with start(worker_model="fake:encode_ms=300") as served:
        memory = await served.create()
        await served.append(memory.name, "a boiler")
        row = await served.row(memory.name)
        for _ in range(MAX_STRIKES + 2):  # One may come too early to meet a batch.
            await eventually(lambda: _on_its_way(served, row.uid))
            await asyncio.sleep(0.1)  # It is in the worker by then, and not yet done.
            await served.app.workers.evict(row.tenant_uid, row.uid)
        await _sound(served, memory.name)


async def _on_its_way(served: Asking, memory_uid: str) -> bool:
    """Whether a batch is, or none is to come."""
    served.app.encoding.wake()
    pipelines = served.app.encoding._pipelines.values()
    encoding = await served.app.catalog.get_encoding(memory_uid, "fake")
    done = encoding is not None and encoding.encoded_number > 0
    return done or any(pipeline._batches for pipeline, _ in pipelines)


class Unwilling(Front):
    """Takes no batch as long as it has an error to refuse it with."""

    refusals: ClassVar[list[EngineError]] = []

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if self.refusals:
            status = status_of(self.refusals.pop())
            await context.abort_with_status(rpc_status.to_status(status))
        async for reply in super().Encode(request, context):
            yield reply


async def test_a_worker_that_is_full_or_goes_down_is_not(start: Serve, tmp_path: Path) -> None:
    full, draining = OverloadedError("full", cause="full"), DrainingError("", cause="draining")
    Unwilling.refusals = [full, draining] * (MAX_STRIKES // 2)
    async with (
        worker_apart(tmp_path / "data", tmp_path / "apart") as worker,
        worker_behind(Unwilling, worker.address, tmp_path) as address,
        start(worker_address=address) as served,
    ):
        memory = await served.create()
        await served.append(memory.name, "a boiler")
        while Unwilling.refusals:
            await asyncio.sleep(0.02)
            served.app.encoding.wake()
        await _sound(served, memory.name)


async def test_a_worker_that_dies_with_a_document_is_held_against_it_once(
    start: Serve, tmp_path: Path
) -> None:
    """However often it is tried until the worker is known to be gone."""
    async with (
        worker_apart(tmp_path / "data", tmp_path / "apart", "fake:encode_ms=60000") as worker,
        start(worker_address=worker.address) as served,
    ):
        memory = await served.create()
        await served.append(memory.name, "a boiler")
        row = await served.row(memory.name)
        await eventually(lambda: _on_its_way(served, row.uid))
        await asyncio.sleep(0.1)
        worker.kill()

        async def gone() -> bool:
            served.app.encoding.wake()
            return served.app.workers.find("fake") is None

        await eventually(gone)
        troubles = served.app.encoding._states["fake"].troubles._troubles
        assert troubles[row.uid].strikes == 1


async def _sound(served: Asking, memory: str) -> None:
    """Waits until the memory's one document has its block, and was not set aside."""
    encoding = await served.ready(memory)
    assert (encoding.encoded_documents, encoding.quarantined_documents) == (1, 0)
