"""Time by which things are forgotten, which a step of the wall clock cannot hurry."""

from __future__ import annotations

import time
from collections.abc import Callable


class SteadyClock:
    """Wall-clock seconds that never run ahead of the time that has really passed.

    A clock that is set forwards by a day would else forget every request_id of the day at
    once, and a retry would append twice. One that is set back is followed: what is kept
    longer does no harm.
    """

    def __init__(
        self,
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._ahead_s = wall_s() - monotonic_s()

    def now_s(self) -> float:
        """Seconds since 1970."""
        return min(self._wall_s(), self._ahead_s + self._monotonic_s())
