"""In-process news of memories: who waits for a change is woken when one happened.

A subscription holds one flag, not a queue: changes that happen while its reader
is busy are one wake-up, so a slow reader costs nothing and sees the latest
state. Who waits for something that no append can bring says so, and is not woken
by one: a flood of appends to a memory would wake all its questions each time.
Everything here runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class TooManySubscribersError(Exception):
    """The bound on subscriptions is reached."""


class Subscription:
    """One reader's view of one memory's changes. appends: whether appends are among them."""

    def __init__(self, *, appends: bool) -> None:
        self.appends = appends
        self._event = asyncio.Event()

    async def changed(self) -> None:
        """Returns at the next change, or at once when one happened since the last return."""
        await self._event.wait()
        self._event.clear()

    def take(self) -> bool:
        """Whether a change happened since the last return of this or of `changed`."""
        happened = self._event.is_set()
        self._event.clear()
        return happened

    def _notify(self) -> None:
        self._event.set()


class Progress:
    """Publish and subscribe by memory uid. Bounded by `max_subscribers` over all memories."""

    def __init__(self, max_subscribers: int = 10_000) -> None:
        self._max_subscribers = max_subscribers
        self._subscribers: dict[str, set[Subscription]] = {}
        self._count = 0

    @property
    def subscribers(self) -> int:
        """Subscriptions open now."""
        return self._count

    def publish(self, memory_uid: str, *, appended: bool = False) -> None:
        """Wakes every subscriber of the memory. Never blocks.

        appended: nothing happened but an append.
        """
        for subscription in self._subscribers.get(memory_uid, ()):
            if subscription.appends or not appended:
                subscription._notify()

    @contextmanager
    def subscribe(self, memory_uid: str, *, appends: bool = True) -> Iterator[Subscription]:
        """A subscription for the length of a with block. appends: whether they count, too.

        Changes from the moment of entry count, so: subscribe, then read the
        state, then wait. Raises TooManySubscribersError.
        """
        if self._count >= self._max_subscribers:
            raise TooManySubscribersError(f"{self._count} subscriptions are open")
        subscription = Subscription(appends=appends)
        self._subscribers.setdefault(memory_uid, set()).add(subscription)
        self._count += 1
        try:
            yield subscription
        finally:
            self._count -= 1
            remaining = self._subscribers[memory_uid]
            remaining.remove(subscription)
            if not remaining:
                del self._subscribers[memory_uid]
