"""Models that workers serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from memsvc.client import convert
from memsvc.client.timeouts import CALL_S
from memsvc.client.transport import Transport
from memsvc.client.types import Model, Page
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1.memory_service_pb2_grpc import MemoryServiceStub

if TYPE_CHECKING:
    from memsvc.v1.memory_service_pb2_grpc import MemoryServiceAsyncStub


class AsyncModels:
    """The models that the server has seen."""

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
        return Page(tuple(convert.model(m) for m in reply.models), reply.next_page_token)

    async def iterate(self, *, page_size: int = 0) -> AsyncGenerator[Model, None]:
        """All models."""
        page = await self.list(page_size=page_size)
        while True:
            for model in page.items:
                yield model
            if not page.next_page_token:
                return
            page = await self.list(page_size=page_size, page_token=page.next_page_token)
