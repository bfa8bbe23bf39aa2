"""Models that workers serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from memsvc.client import convert, serving
from memsvc.client.names import memory_name, model_name
from memsvc.client.serving import Model
from memsvc.client.timeouts import CALL_S
from memsvc.client.transport import Transport
from memsvc.client.types import Memory, Page
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1.memory_service_pb2_grpc import MemoryServiceStub

if TYPE_CHECKING:
    from memsvc.v1.memory_service_pb2_grpc import MemoryServiceAsyncStub


class AsyncModels:
    """The models that the server has seen, and the memories encoded under them."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub: MemoryServiceAsyncStub = MemoryServiceStub(transport.channel)

    async def list(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = CALL_S
    ) -> Page[Model]:
        """One page."""
        request = service.ListModelsRequest(page_size=page_size, page_token=page_token)
        call = self._stub.ListModels
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(tuple(serving.model(m) for m in reply.models), reply.next_page_token)

    async def attach(
        self,
        memory: str,
        model: str,
        *,
        make_default: bool = False,
        timeout_s: float | None = CALL_S,
    ) -> Memory:
        """Has a memory encoded under a further model, in the background.

        make_default: it answers as soon as it is complete. Raises NotFoundError.
        """
        request = service.AttachModelRequest(
            memory=memory_name(memory), model=model_name(model), make_default=make_default
        )
        call = self._stub.AttachModel
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return convert.memory(reply)

    async def detach(self, memory: str, model: str, *, timeout_s: float | None = CALL_S) -> Memory:
        """Drops a memory's blocks of a model. Raises FailedPreconditionError for its default."""
        request = service.DetachModelRequest(memory=memory_name(memory), model=model_name(model))
        call = self._stub.DetachModel
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return convert.memory(reply)

    async def iterate(self, *, page_size: int = 0) -> AsyncGenerator[Model, None]:
        """All models."""
        page = await self.list(page_size=page_size)
        while True:
            for model in page.items:
                yield model
            if not page.next_page_token:
                return
            page = await self.list(page_size=page_size, page_token=page.next_page_token)
