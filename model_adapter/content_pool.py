"""A pool of memory for content KV: a few large arenas within a budget, lent out in pieces.

Pinned memory is dear to get, about a millisecond a MiB, so arenas are made when they are needed
and kept. A piece is the first that is large enough; what is given back joins its neighbours.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

_ARENA_BYTES = 64 * 2**20
#: Pieces begin at multiples of this.
_ALIGNED = 16


@dataclass(eq=False)
class Arena:
    """memory: uint8. free: (start, end) of what is not lent, ascending, no two adjacent."""

    memory: torch.Tensor
    free: list[tuple[int, int]] = field(default_factory=list)

    def take(self, size: int) -> Place | None:
        """The first piece that is large enough."""
        for place, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[place : place + 1] = [(start + size, end)] if end > start + size else []
                return Place(self, start, start + size)
        return None

    def give_back(self, start: int, end: int) -> None:
        """A piece that was taken."""
        place = bisect_left(self.free, (start, end))
        first, last = place, place
        if place and self.free[place - 1][1] == start:
            start, first = self.free[place - 1][0], place - 1
        if place < len(self.free) and self.free[place][0] == end:
            end, last = self.free[place][1], place + 1
        self.free[first:last] = [(start, end)]

    @property
    def empty(self) -> bool:
        """Nothing of it is lent."""
        return self.free == [(0, self.memory.nbytes)]


class Place(NamedTuple):
    """A piece of an arena."""

    arena: Arena
    start: int
    end: int

    @property
    def memory(self) -> torch.Tensor:
        """uint8, at least as long as was asked for."""
        return self.arena.memory[self.start : self.end]


class ContentPool:
    """make: memory, uint8, of so many bytes. What is given back was overwritten by its user."""

    def __init__(self, budget_bytes: int, make: Callable[[int], torch.Tensor]) -> None:
        self._budget_bytes = budget_bytes
        self._make = make
        self._arenas: list[Arena] = []

    @property
    def bytes(self) -> int:
        """Of all arenas."""
        return sum(arena.memory.nbytes for arena in self._arenas)

    def take(self, size: int) -> Place | None:
        """A piece of at least so many bytes; None when there is none and no room for an arena."""
        size = -(-size // _ALIGNED) * _ALIGNED
        for arena in self._arenas:
            if (place := arena.take(size)) is not None:
                return place
        left = self._budget_bytes - self.bytes
        if size > left:
            return None
        capacity = max(size, min(_ARENA_BYTES, left))
        try:
            memory = self._make(capacity)
        except (MemoryError, RuntimeError) as error:  # The latter is torch's own of pinned memory.
            log.warning("no %d bytes more for content: %s", capacity, type(error).__name__)
            self._budget_bytes = self.bytes
            return None
        self._arenas.append(Arena(memory, [(0, memory.nbytes)]))
        return self._arenas[-1].take(size)

    @staticmethod
    def give_back(place: Place) -> None:
        """What `take` gave."""
        place.arena.give_back(place.start, place.end)

    def let_go(self) -> None:
        """Frees the arenas of which nothing is lent, as when none is large enough."""
        self._arenas = [arena for arena in self._arenas if not arena.empty]

    def check_integrity(self, lent: Sequence[Place]) -> None:
        """Raises AssertionError unless exactly these pieces are lent, and no two overlap."""
        assert self.bytes <= self._budget_bytes
        for arena in self._arenas:
            pieces = [(place.start, place.end) for place in lent if place.arena is arena]
            every = sorted([*pieces, *arena.free])
            assert [start for start, _ in every] == [0, *(end for _, end in every[:-1])]
            assert every[-1][1] == arena.memory.nbytes
        assert all(place.arena in self._arenas for place in lent)
