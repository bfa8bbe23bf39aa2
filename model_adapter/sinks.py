"""From the engine's thread to a waiting coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from model_adapter.engine import EngineError

Item = TypeVar("Item")


class LoopSink(Generic[Item]):
    """A queue between the engine's thread and one coroutine of a loop.

    size: bytes an item counts; `ready` is False while more than `window` of them are not
    yet fetched, so that a slow caller holds back only its own job. A producer that asks
    first stays within the window and what it was just making.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        size: Callable[[Item], int] = lambda _: 0,
        window: int = 0,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._size = size
        self._window = window
        self._on_room = on_room
        self._queue: asyncio.Queue[Item | None] = asyncio.Queue()
        self._error: EngineError | None = None
        # Written by the engine's thread (in) and the loop's (out): each sees a value that
        # is at most stale, which only moves the moment of a pause.
        self._bytes_in = 0
        self._bytes_out = 0

    def put(self, item: Item) -> None:
        """See Sink."""
        self._bytes_in += self._size(item)
        self._send(item)

    def end(self, error: EngineError | None) -> None:
        """See Sink."""
        self._error = error
        self._send(None)

    def ready(self) -> bool:
        """See Sink."""
        return self._bytes_in - self._bytes_out <= self._window

    async def items(self) -> AsyncIterator[Item]:
        """Everything in order, then the end. Raises what the job ended with."""
        while (item := await self._queue.get()) is not None:
            yield item
            # Counted when the next is asked for: until then the caller may still hold it.
            blocked = not self.ready()
            self._bytes_out += self._size(item)
            if blocked and self.ready():
                self._on_room()
        if self._error is not None:
            raise self._error

    def _send(self, item: Item | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
