"""How much of a worker's time goes to memories that another model answers for meanwhile.

The worker of that other model often has the same cores. So batches are short: every question
then takes a little longer, instead of a few, those asked during a long batch, twice as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: How long a batch should take, with all that is around it.
_BATCH_S = 0.25
_MIN_BATCH_BYTES = 1024
#: Before anything was measured: a small model on two cores reads about this.
_FIRST_GUESS_BYTES_PER_S = 4_000.0
#: Weight of the newest measurement.
_NEWEST = 0.3


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
        self._bytes_per_s = _FIRST_GUESS_BYTES_PER_S

    @property
    def due(self) -> bool:
        """Whether a batch may start now."""
        return self._began is None and self._clock() >= self._due_at

    @property
    def wait_s(self) -> float | None:
        """Seconds until a batch may start; None while one runs."""
        return None if self._began is not None else max(0.0, self._due_at - self._clock())

    @property
    def batch_bytes(self) -> int:
        """Bytes of text for the next batch."""
        return max(int(self._bytes_per_s * _BATCH_S), _MIN_BATCH_BYTES)

    def begin(self) -> None:
        """A batch starts."""
        self._began = self._clock()

    def end(self, text_bytes: int = 0) -> None:
        """It has ended. text_bytes: of what was encoded; 0 when it went wrong."""
        assert self._began is not None
        now = self._clock()
        took_s = now - self._began
        self._due_at = now + took_s * (1 - self._share) / self._share
        self._began = None
        if text_bytes and took_s > 0:
            self._bytes_per_s += _NEWEST * (text_bytes / took_s - self._bytes_per_s)
