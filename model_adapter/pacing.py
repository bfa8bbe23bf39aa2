"""How much of the engine's time encoding gets, and in pieces of what size.

Sizes follow from the measured speed: the scheduler has no tokenizer, so work is
counted in bytes of UTF-8 text. No clock here; durations are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Until something was measured: about a thousand tokens a second.
_FIRST_BYTES_PER_S = 4096.0
_SMOOTHING = 0.3


@dataclass(frozen=True)
class EncodeShare:
    """batch_s: the longest that the first query in a while waits for encoding that began
    before it came.

    busy_batch_s: the longest that running queries are held up at a time, and that one waits
    which comes within `asked_s` after another. busy_share: of the engine's time, for
    encoding while queries run.
    """

    batch_s: float = 1.5
    busy_batch_s: float = 0.025
    busy_share: float = 0.2
    asked_s: float = 5.0
    smallest_batch_bytes: int = 256
    largest_batch_bytes: int = 1024 * 1024


class EncodePacer:
    """Says when to encode and how much. A document is never split, so one may be longer."""

    def __init__(self, share: EncodeShare | None = None) -> None:
        self._share = share or EncodeShare()
        self._bytes_per_s = _FIRST_BYTES_PER_S
        #: Engine time that queries are owed before the next batch may delay them.
        self._owed_s = 0.0

    def due(self, busy: bool) -> bool:
        """Whether a batch may run now. busy: queries run or wait."""
        return not busy or self._owed_s <= 0

    def batch_bytes(self, quiet_s: float) -> int:
        """Size of the next batch. quiet_s: since a query last ran or waited; 0: one does."""
        share = self._share
        soon = quiet_s < share.asked_s
        wanted = self._bytes_per_s * (share.busy_batch_s if soon else share.batch_s)
        return int(min(max(wanted, share.smallest_batch_bytes), share.largest_batch_bytes))

    def encoded(self, size: int, seconds: float) -> None:
        """A batch of `size` bytes took so long."""
        share = self._share.busy_share
        self._owed_s = seconds * (1 - share) / share
        if size >= self._share.smallest_batch_bytes:
            speed = size / max(seconds, 1e-6)
            self._bytes_per_s += _SMOOTHING * (speed - self._bytes_per_s)

    def stepped(self, seconds: float) -> None:
        """Queries had the engine for so long."""
        self._owed_s = max(self._owed_s - seconds, 0.0)
