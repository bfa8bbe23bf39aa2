"""Refusals come slower the more of them one caller gets.

A client that heeds no refusal sends its next call at once, and refusing that costs nearly
what a call costs. The first few of a caller are told at once, so that who only came too
early knows it; after them one after another, at a steady rate.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

#: Refusals of one caller that are told at once, how many a second come after them, and
#: the longest that one is held back.
BURST = 20
PER_S = 20.0
LONGEST_S = 2.0
#: Held back at once; more are told at once, as holding costs memory.
_HELD = 1024
_CALLERS_KEPT = 4096


class Refusals:
    """For one event loop. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # When the caller's refusals so far are due, the one told longest ago first.
        self._due_at: OrderedDict[str, float] = OrderedDict()
        self._held = 0

    def delay_s(self, caller: str) -> float:
        """Seconds after which the caller is to be told of one more refusal. Counts it."""
        now = self._clock()
        due_at = max(self._due_at.get(caller, 0.0), now - BURST / PER_S) + 1 / PER_S
        # A debt above the longest wait would outlast the flood.
        self._due_at[caller] = min(due_at, now + LONGEST_S)
        self._due_at.move_to_end(caller)
        if len(self._due_at) > _CALLERS_KEPT:
            self._due_at.popitem(last=False)
        return max(0.0, self._due_at[caller] - now)

    async def hold(self, caller: str) -> None:
        """Returns when the caller may be told."""
        delay_s = self.delay_s(caller)
        if not delay_s or self._held >= _HELD:
            return
        self._held += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._held -= 1
