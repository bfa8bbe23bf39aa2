"""A memsvc server in this process, spoken to over a socket, for tests."""

from __future__ import annotations

import shutil
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from memsvc.api_error import STATUS_DETAILS_KEY
from memsvc.config import Config, load_config
from memsvc.server import Server, initialise, open_server
from memsvc.v1 import admin_service_pb2_grpc, memory_service_pb2_grpc
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources

#: A worker that runs apart and is down: what needs no worker is tested without one.
NO_WORKER = "unix:/nonexistent/memsvc-worker.sock"


@dataclass(frozen=True)
class Folder:
    """An initialised data folder that tests copy, and its operator's credential."""

    root: Path
    credential: str

    def copy(self, target: Path, **settings: object) -> Config:
        """Settings of a server on a fresh copy, on a free port, without a worker."""
        if not target.exists():
            shutil.copytree(self.root, target)
        return load_config(
            {"listen": "127.0.0.1:0", "worker_address": NO_WORKER, "data": target, **settings}
        )


def make_folder(root: Path) -> Folder:
    """Blocks; not inside an event loop."""
    credential = initialise(load_config({"data": root})).credential
    assert credential is not None
    return Folder(root, credential)


class Caller:
    """Someone with a credential: `await caller(stub.GetMemory, request)`."""

    def __init__(self, credential: str) -> None:
        self.metadata = (("authorization", f"Bearer {credential}"),)

    def __call__(self, method: Callable[..., Any], request: Any, **options: Any) -> Any:
        return method(request, metadata=self.metadata, **options)


@dataclass
class Served:
    """A running server. as_operator: holds the key that `memsvc init` makes."""

    server: Server
    channel: aio.Channel
    as_operator: Caller

    def __post_init__(self) -> None:
        self.memories: Any = memory_service_pb2_grpc.MemoryServiceStub(self.channel)
        self.admin: Any = admin_service_pb2_grpc.AdminServiceStub(self.channel)

    async def create(self, memory_id: str = "", **fields: Any) -> resources.Memory:
        """A memory of the operator's tenant."""
        request = pb.CreateMemoryRequest(memory_id=memory_id, memory=resources.Memory(**fields))
        memory: resources.Memory = await self.as_operator(self.memories.CreateMemory, request)
        return memory

    async def fork(self, memory: str, memory_id: str = "", **fields: Any) -> pb.ForkMemoryResponse:
        """ForkMemory."""
        request = pb.ForkMemoryRequest(name=memory, memory_id=memory_id, **fields)
        reply: pb.ForkMemoryResponse = await self.as_operator(self.memories.ForkMemory, request)
        return reply

    async def restore(
        self, memory: str, revision: int, request_id: str = ""
    ) -> pb.RestoreMemoryResponse:
        """RestoreMemory."""
        request = pb.RestoreMemoryRequest(name=memory, revision=revision, request_id=request_id)
        call = self.as_operator(self.memories.RestoreMemory, request)
        reply: pb.RestoreMemoryResponse = await call
        return reply

    async def append(
        self, memory: str, *texts: str, request_id: str = ""
    ) -> pb.AppendTurnsResponse:
        """Appends user turns."""
        request = pb.AppendTurnsRequest(memory=memory, turns=turns(*texts), request_id=request_id)
        reply: pb.AppendTurnsResponse = await self.as_operator(self.memories.AppendTurns, request)
        return reply

    async def texts(self, memory: str) -> list[str]:
        """Text of every document, by number, through ListDocuments."""
        found: list[str] = []
        token = ""
        while True:
            page = await self.as_operator(
                self.memories.ListDocuments,
                pb.ListDocumentsRequest(
                    parent=memory, page_size=100, page_token=token, view=resources.FULL
                ),
            )
            for document in page.documents:
                found.extend(turn.text for turn in document.conversation.turns)
                found.extend([document.text.text] if document.HasField("text") else [])
            token = page.next_page_token
            if not token:
                return found


#: The `start` fixture: keyword arguments are settings.
Serve = Callable[..., AbstractAsyncContextManager[Served]]


@asynccontextmanager
async def serve(config: Config, credential: str) -> AsyncIterator[Served]:
    """Opens a server and a channel to it."""
    async with open_server(config) as server, aio.insecure_channel(server.address) as channel:
        yield Served(server, channel, Caller(credential))


def turns(*texts: str) -> list[resources.Turn]:
    """User turns."""
    return [resources.Turn(role=resources.USER, text=text) for text in texts]


@dataclass(frozen=True)
class Refusal:
    """A failed call, decoded. retry_s: of RetryInfo, None without one."""

    code: str
    reason: str
    field: str
    metadata: dict[str, str]
    message: str
    retry_s: float | None


def refusal(error: aio.AioRpcError) -> Refusal:
    """Fails unless the error carries exactly one ErrorInfo of memsvc."""
    details = [v for k, v in error.trailing_metadata() or () if k == STATUS_DETAILS_KEY]
    assert len(details) == 1, f"no status details: {error}"
    assert isinstance(details[0], bytes)
    status = status_pb2.Status.FromString(details[0])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "memsvc"
    retries = [d for d in status.details if d.Unpack(retry)]
    metadata = dict(info.metadata)
    return Refusal(
        error.code().name,
        info.reason,
        metadata.pop("field", ""),
        metadata,
        status.message,
        retry.retry_delay.ToMicroseconds() / 1e6 if retries else None,
    )


async def refused(call: Any) -> Refusal:
    """Awaits a call, or reads a stream to its end, that must fail."""
    with pytest.raises(aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return refusal(caught.value)


def free_port() -> int:
    """A port that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def names_of(resources_listed: Sequence[Any]) -> list[str]:
    """Resource names."""
    return [resource.name for resource in resources_listed]
