"""A token bucket that may go into debt (docs/adr/0008)."""

from __future__ import annotations

_MINUTE_S = 60.0


class Bucket:
    """per_minute: units added a minute, and the most that lie in it. 0: no limit.

    What a call costs is often known only after it: the tokens of its answer, the
    bytes of its stream. So spending always succeeds, and a bucket that is in debt
    lets nothing in until it is paid back. Times are seconds of one monotonic clock.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, now: float) -> float:
        """Seconds until the next call may come; 0: now."""
        if not self.per_minute:
            return 0.0
        self._fill(now)
        return max(0.0, (1.0 - self._level) * _MINUTE_S / self.per_minute)

    def spend(self, amount: int, now: float) -> None:
        """Takes units out, also ones that are not in it."""
        if self.per_minute:
            self._fill(now)
            self._level -= amount

    def full(self, now: float) -> bool:
        """Whether nothing of it is spent: it can be thrown away and made anew."""
        self._fill(now)
        return self._level >= self.per_minute

    def _fill(self, now: float) -> None:
        added = max(0.0, now - self._at) * self.per_minute / _MINUTE_S
        self._level = min(self._level + added, float(self.per_minute))
        self._at = now
