"""When a failed call is tried again, and how long to wait before. No I/O here.

Rules:
  1. Only calls that are safe to repeat are: reads, and writes that carry a
     request_id or are idempotent by nature. The caller of `should_retry` says so.
  2. UNAVAILABLE is retried, and so is CANCELLED: a server that stops answers so
     the calls that reach it last. (A call cancelled here never gets this far.)
     RESOURCE_EXHAUSTED is retried only when the server sent a retry hint: a
     full disk does not empty itself.
  3. The wait doubles from `initial_s` up to `ceiling_s`, and is drawn from
     [half, whole] of it so that clients spread out. The server's hint is a
     lower bound.
  4. A wait that would pass the call's deadline ends the call with its error.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from memsvc.client.errors import (
    ApiError,
    CallCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)


@dataclass(frozen=True)
class RetryPolicy:
    """How persistent a client is. attempts counts the first try too; 1 never retries."""

    attempts: int = 6
    initial_s: float = 0.1
    ceiling_s: float = 5.0
    # Jitter only; nothing secret depends on it.
    source: random.Random = field(default_factory=random.Random, repr=False, compare=False)

    def wait_s(self, attempt: int, error: ApiError, remaining_s: float | None) -> float | None:
        """Seconds to wait after the failed `attempt` (from 1), or None to give up.

        remaining_s is the time left of the call's deadline, None without one.
        """
        if attempt >= self.attempts or not may_succeed_later(error):
            return None
        backoff = min(self.ceiling_s, self.initial_s * 2 ** (attempt - 1))
        wait = max(self.source.uniform(backoff / 2, backoff), error.retry_after_s or 0.0)
        if remaining_s is not None and wait >= remaining_s:
            return None
        return wait


def may_succeed_later(error: ApiError) -> bool:
    """Whether the same call may succeed when it is repeated after a while."""
    if isinstance(error, UnavailableError | CallCancelledError):
        return True
    return isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None


NO_RETRIES = RetryPolicy(attempts=1)
