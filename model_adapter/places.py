"""Whose turn it is to page a memory in: of the threads for that, nobody has all of them.

Page-ins of one memory wait for each other, so more than two threads would do nothing but
wait: for all of a memory that is long in coming, a second question has a thread and the
others wait here. Among tenants it is as in `turns`: who has the fewest goes first, and none
may have more than SHARE times what is still free.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from model_adapter.residency import MemoryKey
from model_adapter.turns import has_room

#: The one that reads, and one that goes on as soon as that is done.
_OF_A_MEMORY = 2


class Places:
    """A number of places. Of one event loop."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._held: Counter[MemoryKey] = Counter()
        self._tenants: Counter[str] = Counter()
        self._line: list[tuple[MemoryKey, asyncio.Future[None]]] = []

    async def take(self, memory: MemoryKey) -> None:
        """Returns with a place, which is to be given back; cancelled, without."""
        turn = asyncio.get_running_loop().create_future()
        self._line.append((memory, turn))
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._line.remove((memory, turn))
            else:  # Its turn had just come.
                self.give_back(memory)
            raise

    def give_back(self, memory: MemoryKey) -> None:
        """Ends what `take` began."""
        self._held -= Counter([memory])
        self._tenants -= Counter([memory.tenant])
        self._advance()

    def _advance(self) -> None:
        while ready := [one for one in self._line if self._may(*one)]:
            first = min(ready, key=lambda one: self._tenants[one[0].tenant])
            self._line.remove(first)
            memory, turn = first
            self._held[memory] += 1
            self._tenants[memory.tenant] += 1
            turn.set_result(None)

    def _may(self, memory: MemoryKey, turn: asyncio.Future[None]) -> bool:
        if turn.done() or self._held[memory] >= _OF_A_MEMORY:
            return False
        return has_room(self._places, self._tenants.total(), self._tenants[memory.tenant])
