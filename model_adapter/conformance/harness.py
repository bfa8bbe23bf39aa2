"""A connection to the worker under test, and memsvc's part as the writer of the store."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from model_adapter.conformance.report import ContractError, SkippedError, require
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceStub
from model_adapter.wire import MAX_MESSAGE_BYTES
from storage.documents import Source, TextSource, render
from storage.layout import NUMPY_DTYPE, Bits, KVBlock, KVLayout, LayoutError
from storage.lmdb_store import LmdbStore
from storage.paths import DataFolder
from storage.store import EncodingId, MemoryUid, StoredDocument

if TYPE_CHECKING:
    # In the stub file alone.
    from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceAsyncStub

#: One topic each, so that a question is about one of them alone.
TEXTS = (
    "Anna bought a red sailing boat in Kiel last spring and named it Petrel.",
    "Bob plays chess with Carla every Friday evening in the old library.",
    "The vegetable garden needs water twice a day when summer turns dry.",
    "My grandmother's recipe for plum cake uses cinnamon and brown sugar.",
    "The dentist moved our appointment to the ninth of November at noon.",
    "Karim repaired the boiler in the basement with a valve from Denmark.",
    "Our cat Mittens sleeps on the piano and wakes when somebody plays.",
    "The night train to Vienna leaves from platform seven at ten o'clock.",
)

CALL_S = 120.0
DOMAIN = "model_adapter"

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)


@dataclass
class Memory:
    """A memory of the run's own: documents 1 to last, stored and encoded."""

    tenant: str
    uid: str
    last: int = 0


@dataclass
class Harness:
    """What the checks use. tolerance: largest relative error between equal blocks."""

    stub: ModelAdapterServiceAsyncStub
    info: pb.GetInfoResponse
    layout: KVLayout
    data: DataFolder | None
    tolerance: float
    tenant: str = field(default_factory=lambda: secrets.token_hex(16))
    _stores: dict[str, LmdbStore] = field(default_factory=dict)

    @property
    def encoding(self) -> EncodingId:
        """As storage names it."""
        return EncodingId(bytes.fromhex(self.info.identity)[:16])

    def store(self, tenant: str) -> LmdbStore:
        """A tenant's store. Raises SkippedError without the worker's data folder."""
        if self.data is None:
            raise SkippedError("needs --data-dir, the folder that the worker reads")
        if tenant not in self._stores:
            self._stores[tenant] = LmdbStore(self.data.tenant(tenant))
        return self._stores[tenant]

    async def close(self) -> None:
        """Has the worker forget the run's tenants, and removes what was stored of them."""
        for tenant, store in self._stores.items():
            await self.stub.Evict(pb.EvictRequest(tenant=tenant), timeout=CALL_S)
            for memory in store.memories():
                store.delete_memory(memory)
            store.close()
        self._stores.clear()

    async def memory(self, texts: Sequence[str | Source] = TEXTS, tenant: str = "") -> Memory:
        """A fresh memory that holds these texts."""
        memory = Memory(tenant or self.tenant, secrets.token_hex(16))
        await self.append(memory, texts)
        return memory

    async def append(self, memory: Memory, texts: Sequence[str | Source]) -> None:
        """Stores further documents with the blocks that the worker makes of them."""
        uid, store = MemoryUid(bytes.fromhex(memory.uid)), self.store(memory.tenant)
        if not texts:
            return
        sources = [TextSource(text) if isinstance(text, str) else text for text in texts]
        stored = list(enumerate(sources, memory.last + 1))
        store.put_documents(uid, [StoredDocument(n, n, 0, source) for n, source in stored])
        numbered = [(n, render(source)) for n, source in stored]
        replies = await self.encode(numbered, tenant=memory.tenant, memory_uid=memory.uid)
        blocks = [self.block(replies[number]) for number, _ in numbered if number in replies]
        require(len(blocks) == len(numbered), "Encode left documents out")
        store.put_blocks(uid, self.encoding, self.layout, blocks)
        memory.last += len(numbered)

    async def encode(
        self,
        documents: Sequence[tuple[int, str]],
        *,
        tenant: str = "",
        memory_uid: str = "",
        identity: str = "",
    ) -> dict[int, pb.EncodeResponse]:
        """Replies by number. A number that comes twice, or was not asked, breaks the contract."""
        request = pb.EncodeRequest(
            tenant=tenant or self.tenant,
            memory_uid=memory_uid or "c0" * 16,
            identity=identity or self.info.identity,
            documents=[pb.DocumentText(number=n, text=text) for n, text in documents],
        )
        asked = {number for number, _ in documents}
        replies: dict[int, pb.EncodeResponse] = {}
        async for reply in self.stub.Encode(request, timeout=CALL_S):
            require(reply.number in asked, f"document {reply.number} was not asked for")
            require(reply.number not in replies, f"document {reply.number} is answered twice")
            replies[reply.number] = reply
        return replies

    def block(self, reply: pb.EncodeResponse) -> KVBlock:
        """The block of a reply. Raises ContractError where it does not fit the layout."""
        number, wire, layout = reply.number, reply.block, self.layout
        require(
            reply.WhichOneof("result") == "block",
            f"document {number} has no block: {reply.failure.reason or 'no reason given'}",
        )
        require(
            wire.chunks == layout.chunks(wire.tokens),
            f"document {number}: {wire.tokens} tokens make {layout.chunks(wire.tokens)} chunks "
            f"of {layout.pool_tokens}, not {wire.chunks}",
        )
        shape = (len(layout.routed_layers), wire.chunks, layout.width)
        dtype = NUMPY_DTYPE[layout.dtype]
        wanted = len(layout.routed_layers) * wire.chunks * layout.width * dtype.itemsize

        def array(name: str) -> Bits:
            data: bytes = getattr(wire, name)
            require(
                len(data) == wanted,
                f"document {number}: {name} has {len(data)} bytes, the layout says {wanted}",
            )
            if layout.dtype == "bf16":
                return np.frombuffer(data, np.dtype("<u2")).reshape(shape)
            return np.frombuffer(data, np.dtype("<f4")).reshape(shape)

        separate = layout.separate_routing_keys
        require(separate or not wire.key, f"document {number}: key, where routing keys are keys")
        key = array("key") if separate else None
        block = KVBlock(number, wire.tokens, array("routing_key"), key, array("value"))
        try:
            block.validate(layout)
        except LayoutError as error:
            raise ContractError(str(error)) from error
        return block

    def reference(self, memory: Memory, *, last: int | None = None, epoch: int = 0) -> pb.MemoryRef:
        """A memory up to a document. last: None for all."""
        return pb.MemoryRef(
            tenant=memory.tenant,
            memory_uid=memory.uid,
            last_number=memory.last if last is None else last,
            deletion_epoch=epoch,
            identity=self.info.identity,
        )

    async def route(
        self,
        reference: pb.MemoryRef,
        question: str,
        limit: int = 10,
        wanted: pb.DocumentFilter | None = None,
    ) -> list[pb.RankedDocument]:
        """The ranking, best first."""
        request = pb.RouteRequest(memory=reference, question=question, limit=limit, filter=wanted)
        return list((await self.stub.Route(request, timeout=CALL_S)).documents)

    async def answer(self, request: pb.QueryRequest) -> list[pb.QueryResponse]:
        """All events."""
        return [event async for event in self.stub.Query(request, timeout=CALL_S)]

    async def quiet(self, within_s: float) -> bool:
        """Whether nothing runs or waits before the time is over."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            held = (await self.stub.GetInfo(pb.GetInfoRequest(), timeout=CALL_S)).residency
            if not held.running_queries and not held.waiting_queries:
                return True
            await asyncio.sleep(0.02)
        return False


async def refused(
    call: Awaitable[object], code: grpc.StatusCode, reason: str, what: str
) -> dict[str, str]:
    """Metadata of the error by which a call was refused, which must be this one."""
    try:
        await call
    except aio.AioRpcError as error:
        info = error_info(error)
        require(info is not None, f"{what}: {error.code().name} without ErrorInfo")
        assert info is not None
        require(info.domain == DOMAIN, f"{what}: ErrorInfo of domain {info.domain!r}")
        found = (error.code().name, info.reason)
        wanted = (code.name, reason)
        require(found == wanted, f"{what}: refused with {found}, not {wanted}")
        return dict(info.metadata)
    raise ContractError(f"{what}: not refused; {code.name} {reason} is due")


def error_info(error: aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    """The ErrorInfo of a failed call, if it has one."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info
    return None


@asynccontextmanager
async def connected(
    address: str, data: DataFolder | None, tolerance: float
) -> AsyncIterator[Harness]:
    """A harness on a worker. Raises ContractError, AioRpcError when nothing answers."""
    async with aio.insecure_channel(address, options=_OPTIONS) as channel:
        stub: Any = ModelAdapterServiceStub(channel)
        info: pb.GetInfoResponse = await stub.GetInfo(
            pb.GetInfoRequest(), timeout=CALL_S, wait_for_ready=True
        )
        try:
            layout = KVLayout.of(info.layout)
        except LayoutError as error:
            raise ContractError(f"GetInfo: layout: {error}") from error
        harness = Harness(stub, info, layout, data, tolerance)
        try:
            yield harness
        finally:
            await harness.close()
