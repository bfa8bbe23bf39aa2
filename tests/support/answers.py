"""A server in this process with a real worker process under it, and questions to it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memsvc.application import Application
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.workers.supervisor import SocketPlace, WorkerCommand, WorkerProcess
from storage.catalog import EncodingState, MemoryRow
from storage.paths import DataFolder
from storage.store import EncodingId, MemoryUid
from tests.support.served import Folder, Served, serve

#: Longer than anything here takes on a busy machine.
PATIENCE_S = 60.0


@dataclass
class Answer:
    """A streamed answer, collected."""

    text: str = ""
    routings: list[pb.Routing] = field(default_factory=list)
    citations: list[pb.Citation] = field(default_factory=list)
    usage: pb.Usage | None = None
    done: pb.Done | None = None

    def take(self, event: pb.QueryResponse) -> None:
        """Adds one event. Fails when the order that the proto promises is broken."""
        assert self.done is None, "an event after Done"
        kind = event.WhichOneof("event")
        assert self.usage is None or kind == "done", "only Done follows Usage"
        match kind:
            case "text":
                self.text += event.text.text
            case "routing":
                self.routings.append(event.routing)
            case "citation":
                self.citations.append(event.citation)
            case "usage":
                self.usage = event.usage
            case "done":
                assert self.usage is not None
                self.done = event.done

    @property
    def cited(self) -> list[int]:
        """Numbers of the cited documents."""
        return [citation.number for citation in self.citations]


@dataclass
class Asking(Served):
    """A running server whose worker answers."""

    @property
    def app(self) -> Application:
        """The server's parts."""
        return self.server.application

    def stream(self, memory: str, question: str, **fields: Any) -> Any:
        """The raw call."""
        timeout = fields.pop("timeout", PATIENCE_S)
        request = pb.QueryRequest(memory=memory, question=question, **fields)
        return self.as_operator(self.memories.Query, request, timeout=timeout)

    async def ask(self, memory: str, question: str, **fields: Any) -> Answer:
        """A whole answer."""
        answer = Answer()
        async for event in self.stream(memory, question, **fields):
            answer.take(event)
        assert answer.done is not None
        return answer

    async def get(self, memory: str) -> resources.Memory:
        """GetMemory."""
        found: resources.Memory = await self.as_operator(
            self.memories.GetMemory, pb.GetMemoryRequest(name=memory)
        )
        return found

    async def delete(self, memory: str) -> None:
        """DeleteMemory."""
        await self.as_operator(self.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory))

    async def delete_documents(self, memory: str, *numbers: int) -> None:
        """DeleteDocuments."""
        request = pb.DeleteDocumentsRequest(
            parent=memory, names=[f"{memory}/documents/{number}" for number in numbers]
        )
        await self.as_operator(self.memories.DeleteDocuments, request)

    async def row(self, memory: str) -> MemoryRow:
        """The catalog's row of a memory of the operator's tenant."""
        tenant = await self.app.catalog.get_tenant("default")
        return await self.app.catalog.get_memory(tenant.uid, memory.removeprefix("memories/"))

    async def ready(self, memory: str) -> resources.Encoding:
        """Returns its one encoding once nothing waits."""

        async def look() -> resources.Encoding | None:
            encodings = (await self.get(memory)).encodings
            done = encodings and encodings[0].state == resources.Encoding.READY
            return encodings[0] if done else None

        found: resources.Encoding = await eventually(look)
        return found

    async def blocks(self, memory: MemoryRow) -> list[int]:
        """Numbers of the documents that have a block under the model that answers."""
        now = await self.app.catalog.get_memory_by_uid(memory.uid)
        model = await self.app.catalog.get_model(now.default_model_id)
        encoding = EncodingId(bytes.fromhex(model.identity)[:16])
        uid = MemoryUid(bytes.fromhex(memory.uid))
        return await self.app.stores.read(
            memory.tenant_uid, lambda store: store.block_numbers(uid, encoding)
        )

    async def problems(self, memory: MemoryRow) -> list[str]:
        """What `check` says of the tenant's store, and every live document without a block."""
        found = await self.app.stores.read(
            memory.tenant_uid, lambda store: [str(finding) for finding in store.check()]
        )
        blocks = set(await self.blocks(memory))
        live = await self.app.catalog.live_numbers(memory.uid, 1, memory.last_number)
        now = await self.app.catalog.get_memory_by_uid(memory.uid)
        encoding = await self.app.catalog.get_encoding(memory.uid, now.default_model_id)
        assert encoding is not None
        aside = await self.app.catalog.quarantined(memory.uid, encoding.model_id)
        if encoding.state is EncodingState.READY:
            found += [f"no block: {n}" for n in live if n not in blocks and n not in aside]
        return found + [f"block of no document: {n}" for n in blocks - set(live)]

    async def worker_pid(self) -> int:
        """The process id of the worker that serves now."""

        async def look() -> int | None:
            return self.app.workers.supervised_pid if self.app.workers.served() else None

        pid: int = await eventually(look)
        return pid

    async def kill_worker(self) -> int:
        """SIGKILL; returns the pid that is gone."""
        pid = await self.worker_pid()
        os.kill(pid, signal.SIGKILL)
        return pid


async def eventually(look: Callable[[], Awaitable[Any]], patience_s: float = PATIENCE_S) -> Any:
    """The first thing that `look` returns which is true."""
    end = time.monotonic() + patience_s
    while not (found := await look()):
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.02)
    return found


@asynccontextmanager
async def worker_apart(
    data: Path, folder: Path, model: str = "fake"
) -> AsyncIterator[WorkerProcess]:
    """A worker that runs apart, on a socket of its own."""
    await asyncio.to_thread(folder.mkdir)
    socket = SocketPlace(DataFolder(folder))
    command = WorkerCommand((f"--data-dir={data}", f"--model={model}", "--threads=1"), 60.0)
    worker = await WorkerProcess.start(command, socket)
    try:
        yield worker
    finally:
        await worker.stop()
        socket.clear()


@asynccontextmanager
async def asking(folder: Folder, target: Path, **settings: object) -> AsyncIterator[Asking]:
    """A server on a copy of the folder (or on what is there already) with a fake worker."""
    defaults = {"worker_address": "", "worker_model": "fake", "worker_threads": 1}
    config = folder.copy(target, **{**defaults, "drain_grace_s": 5.0, **settings})
    async with serve(config, folder.credential) as running:
        yield Asking(running.server, running.channel, running.as_operator)
