"""A real worker process, and a client of it that also plays memsvc's part as the writer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceStub
from storage.documents import TextSource, render
from storage.layout import Bits, KVBlock, KVLayout
from storage.lmdb_store import LmdbStore
from storage.paths import DataFolder
from storage.store import EncodingId, MemoryUid, StoredDocument

if TYPE_CHECKING:  # It exists for the type checker alone.
    from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceAsyncStub

MESSAGE_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
)


class WorkerProcess:
    """python -m model_adapter in a child, ready when made."""

    def __init__(self, root: Path, model: str = "fake", *arguments: str, listen: str = "") -> None:
        self.data = DataFolder(root)
        self.socket = root / "w.sock"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "model_adapter",
                f"--listen={listen or f'unix:{self.socket}'}",
                f"--data-dir={root}",
                f"--model={model}",
                "--threads=1",
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.errors: list[str] = []
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.address = json.loads(self.first_line)["address"] if self.first_line else ""

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def wait(self, timeout_s: float = 15) -> int:
        """Exit status, when it has ended by itself; the logs are then complete."""
        status = self.process.wait(timeout_s)
        self._drain.join(timeout_s)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals it and waits."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.wait()
        finally:
            self.process.kill()
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()

    def logs(self) -> str:
        """All of standard error so far."""
        return "".join(self.errors)


@dataclass
class Client:
    """Stub, info, and the stores that memsvc would write."""

    stub: ModelAdapterServiceAsyncStub
    info: pb.GetInfoResponse
    layout: KVLayout
    data: DataFolder
    _stores: dict[str, LmdbStore] = field(default_factory=dict)

    @property
    def encoding(self) -> EncodingId:
        """As storage names it."""
        return EncodingId(bytes.fromhex(self.info.identity)[:16])

    def store(self, tenant: str) -> LmdbStore:
        """The tenant's, open for writing."""
        if tenant not in self._stores:
            self._stores[tenant] = LmdbStore(self.data.tenant(tenant))
        return self._stores[tenant]

    def close(self) -> None:
        """Closes the stores."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    async def fill(self, tenant: str, memory: str, texts: Sequence[str], first: int = 1) -> None:
        """Stores texts as documents, has them encoded, and stores the blocks."""
        documents = [
            StoredDocument(number, number, 0, TextSource(text))
            for number, text in enumerate(texts, first)
        ]
        uid, store = MemoryUid(bytes.fromhex(memory)), self.store(tenant)
        store.put_documents(uid, documents)
        rendered = [(d.number, render(d.source)) for d in documents]
        blocks = [self.block(reply) async for reply in self.encode(tenant, memory, rendered)]
        store.put_blocks(uid, self.encoding, self.layout, blocks)

    def encode(
        self, tenant: str, memory: str, documents: Sequence[tuple[int, str]], identity: str = ""
    ) -> aio.UnaryStreamCall[pb.EncodeRequest, pb.EncodeResponse]:
        """The call."""
        return self.stub.Encode(
            pb.EncodeRequest(
                tenant=tenant,
                memory_uid=memory,
                identity=identity or self.info.identity,
                documents=[pb.DocumentText(number=n, text=text) for n, text in documents],
            )
        )

    def block(self, reply: pb.EncodeResponse) -> KVBlock:
        """The block of a reply that has one."""
        wire = reply.block
        shape = (len(self.layout.routed_layers), wire.chunks, self.layout.width)

        def array(data: bytes) -> Bits:
            if self.layout.dtype == "bf16":
                return np.frombuffer(data, np.uint16).reshape(shape)
            return np.frombuffer(data, np.float32).reshape(shape)

        key = array(wire.key) if self.layout.separate_routing_keys else None
        block = KVBlock(reply.number, wire.tokens, array(wire.routing_key), key, array(wire.value))
        block.validate(self.layout)
        return block

    def ref(self, tenant: str, memory: str, last: int, epoch: int = 0) -> pb.MemoryRef:
        """A memory as of a number."""
        return pb.MemoryRef(
            tenant=tenant,
            memory_uid=memory,
            last_number=last,
            deletion_epoch=epoch,
            identity=self.info.identity,
        )

    def query(
        self, ref: pb.MemoryRef, question: str, timeout: float | None = None, **more: Any
    ) -> aio.UnaryStreamCall[pb.QueryRequest, pb.QueryResponse]:
        """The call."""
        request = pb.QueryRequest(memory=ref, question=question, **more)
        return self.stub.Query(request, timeout=timeout)

    async def answer(self, ref: pb.MemoryRef, question: str) -> tuple[str, list[int]]:
        """Text and cited numbers."""
        text, cited = "", []
        async for event in self.query(ref, question):
            text += event.text.text
            if event.WhichOneof("event") == "citation":
                cited.append(event.citation.number)
        return text, cited

    async def quiet(self) -> pb.ResidencyInfo:
        """Waits until no query runs or waits; returns what is then held."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            residency = (await self.stub.GetInfo(pb.GetInfoRequest())).residency
            if not residency.running_queries and not residency.waiting_queries:
                return residency
            await asyncio.sleep(0.005)
        raise AssertionError("queries go on")


@asynccontextmanager
async def connected(worker: WorkerProcess) -> AsyncIterator[Client]:
    """A client of a running worker."""
    async with aio.insecure_channel(worker.address, options=MESSAGE_OPTIONS) as channel:
        stub: ModelAdapterServiceAsyncStub = ModelAdapterServiceStub(channel)
        info = await stub.GetInfo(pb.GetInfoRequest(), timeout=10, wait_for_ready=True)
        layout = KVLayout.of(info.layout)
        client = Client(stub, info, layout, worker.data)
        try:
            yield client
        finally:
            client.close()


async def rest(
    call: aio.UnaryStreamCall[pb.QueryRequest, pb.QueryResponse],
) -> list[pb.QueryResponse]:
    """What a call that was read from brings until its end."""
    events = []
    while event := await call.read():  # False at the end of the stream.
        assert isinstance(event, pb.QueryResponse)
        events.append(event)
    return events


def error_info(error: aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of a failed call; it has one, of the worker's domain."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no status details: {error.code()} {error.details()}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "model_adapter"
    return info


def has_retry_info(error: aio.AioRpcError) -> bool:
    """Whether the status says when to try again."""
    status = rpc_status.from_call(error)
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
