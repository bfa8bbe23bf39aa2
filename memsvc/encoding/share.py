"""How much of a worker's time goes to memories that another model answers for meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable


class Share:
    """Lets one batch at a time through, and after it a pause in proportion to its length.

    share: of the time, above 0 and at most 1. Where it is due it goes first, so it is
    what such memories get also while others wait; never more.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._began: float | None = None
        self._due_at = 0.0

    @property
    def due(self) -> bool:
        """Whether a batch may start now."""
        return self._began is None and self._clock() >= self._due_at

    @property
    def wait_s(self) -> float | None:
        """Seconds until a batch may start; None while one runs."""
        return None if self._began is not None else max(0.0, self._due_at - self._clock())

    def begin(self) -> None:
        """A batch starts."""
        self._began = self._clock()

    def end(self) -> None:
        """It has ended, well or not."""
        assert self._began is not None
        now = self._clock()
        self._due_at = now + (now - self._began) * (1 - self._share) / self._share
        self._began = None
