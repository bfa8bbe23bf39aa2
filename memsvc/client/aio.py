"""The asyncio client. `Client` in sync.py is made from it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from memsvc.client.admin import AsyncAdmin
from memsvc.client.connection import TLS, Connection
from memsvc.client.handle import AsyncMemoryHandle
from memsvc.client.memories import AsyncMemories
from memsvc.client.models import AsyncModels
from memsvc.client.retry import RetryPolicy
from memsvc.client.transport import Transport


class AsyncClient:
    """A connection to one memsvc server; make it in a running event loop.

    Nothing is sent before the first call. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        address: str,
        api_key: str,
        *,
        tls: TLS | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Without tls the connection is not encrypted. Raises ConfigurationError."""
        self._transport = Transport(Connection(address, api_key, tls), retry or RetryPolicy())
        self._memories = AsyncMemories(self._transport)
        self._models = AsyncModels(self._transport)
        self._admin = AsyncAdmin(self._transport)

    @classmethod
    def from_environment(cls, *, retry: RetryPolicy | None = None) -> Self:
        """As MEMSVC_ADDRESS, MEMSVC_API_KEY and MEMSVC_TLS_ROOTS say."""
        found = Connection.from_environment()
        return cls(found.address, found.api_key, tls=found.tls, retry=retry)

    @property
    def memories(self) -> AsyncMemories:
        """The tenant's memories."""
        return self._memories

    @property
    def models(self) -> AsyncModels:
        """The models that the server has seen."""
        return self._models

    @property
    def admin(self) -> AsyncAdmin:
        """Tenants, API keys and usage."""
        return self._admin

    def memory(self, memory: str) -> AsyncMemoryHandle:
        """A memory by id or name. Calls nothing, so it need not exist yet."""
        return AsyncMemoryHandle(self._transport, memory)

    async def close(self) -> None:
        """Closes the connection; running calls end with CallCancelledError."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
