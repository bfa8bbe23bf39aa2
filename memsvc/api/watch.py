"""WatchMemory: a memory's progress, at once and then at each change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from memsvc import errors
from memsvc.api.memories import find_memory
from memsvc.application import Application
from memsvc.convert import memory_to_wire
from memsvc.progress import Subscription, TooManySubscribersError
from memsvc.v1 import memory_service_pb2 as pb
from storage.catalog import MemoryRow, MemoryState, NotFoundError


class WatchHandler:
    """Watching memories."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def watch(self, request: pb.WatchMemoryRequest) -> AsyncGenerator[pb.WatchMemoryResponse]:
        """Ends with MEMORY_NOT_FOUND at deletion and with DRAINING at shutdown.

        The state is read when there is room to send it, so a slow reader skips
        states but never falls behind.
        """
        memory = await find_memory(self._app, "name", request.name)
        try:
            with self._app.progress.subscribe(memory.uid) as subscription:
                sent: pb.WatchMemoryResponse | None = None
                while True:
                    state = await self._state(memory)
                    if state != sent:
                        yield state
                        sent = state
                    await self._changed(subscription)
        except TooManySubscribersError as error:
            raise errors.overloaded() from error

    async def _state(self, memory: MemoryRow) -> pb.WatchMemoryResponse:
        try:
            row = await self._app.catalog.get_memory_by_uid(memory.uid)
        except NotFoundError as error:
            raise errors.memory_not_found() from error
        if row.state is MemoryState.DELETING:
            raise errors.memory_not_found()
        wire = memory_to_wire(row, await self._app.catalog.list_encodings(row.uid))
        return pb.WatchMemoryResponse(
            revision=wire.revision,
            state=wire.state,
            encodings=wire.encodings,
            default_model=wire.default_model,
            next_model=wire.next_model,
        )

    async def _changed(self, subscription: Subscription) -> None:
        """Returns at the next change. Raises DRAINING when the server goes down."""
        change = asyncio.create_task(subscription.changed())
        drain = asyncio.create_task(self._app.draining.wait())
        try:
            await asyncio.wait((change, drain), return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
            drain.cancel()
        if self._app.draining.is_set():
            raise errors.draining()
