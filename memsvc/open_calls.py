"""Calls in flight by who made them, so that they can end when their credential does.

Which calls that are is for the gate to say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from memsvc import errors
from memsvc.principal import Principal


class OpenCall:
    """One call that may be ended from outside. interrupted: also in the middle of its work."""

    def __init__(self, principal: Principal, *, interrupted: bool) -> None:
        self.principal = principal
        self.ended = False
        self._task = asyncio.current_task() if interrupted else None
        self._cancelled = False
        self._timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Makes the call fail with CREDENTIAL_INVALID: at its next step, or before it begins."""
        if self.ended:
            return
        self.ended = True
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()

    def require_live(self) -> None:
        """Raises CREDENTIAL_INVALID when the credential ended while the call waited."""
        if self.ended:
            raise errors.credential_invalid()

    def end_in(self, seconds: float) -> None:
        """Ends the call later; takes the place of an earlier such request."""
        self.forget_timer()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self.end)

    def forget_timer(self) -> None:
        """The call is over."""
        if self._timer is not None:
            self._timer.cancel()

    def was_ended(self) -> bool:
        """Whether the cancellation being handled is ours alone; it is then taken back."""
        return self._cancelled and self._task is not None and self._task.uncancel() == 0


class OpenCalls:
    """All calls of one server that may be ended from outside."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._calls: set[OpenCall] = set()

    @contextmanager
    def watch(self, principal: Principal, *, ends: bool) -> Iterator[OpenCall]:
        """The call of the running task, until the block ends.

        ends: with its credential, wherever it is; CREDENTIAL_INVALID is then raised out of the
        block. Any other call asks `require_live` before it begins, and is not ended after.
        """
        call = OpenCall(principal, interrupted=ends)
        self._calls.add(call)
        if principal.ends_us is not None:
            call.end_in(principal.ends_us / 1e6 - self._clock())
        try:
            yield call
        except asyncio.CancelledError as error:
            if not call.was_ended():
                raise
            raise errors.credential_invalid() from error
        finally:
            call.forget_timer()
            self._calls.discard(call)

    def end_key(self, key_id: str, ends_us: int) -> None:
        """Ends what the key's holder has open, then or now."""
        for call in self._calls:
            if call.principal.key_id == key_id:
                self._end_at(call, ends_us)

    def end_tenant(self, tenant_uid: str) -> None:
        """Ends all that the tenant's keys have open."""
        for call in self._calls:
            if call.principal.tenant_uid == tenant_uid:
                call.end()

    def _end_at(self, call: OpenCall, ends_us: int) -> None:
        left_s = ends_us / 1e6 - self._clock()
        if left_s <= 0:
            call.end()
        else:
            call.end_in(left_s)
