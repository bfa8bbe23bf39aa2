"""What a crash loop counts, and how its clients repeat what a crash cut short."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from typing import TypeVar

from memsvc.client import (
    CallCancelledError,
    DataLossError,
    DeadlineExceededError,
    InternalError,
    MemsvcError,
    ResourceExhaustedError,
    StreamBrokenError,
    UnavailableError,
)

T = TypeVar("T")

#: What a call may end with while processes die around it.
CUT_SHORT = (UnavailableError, CallCancelledError, DeadlineExceededError, StreamBrokenError)
BROKEN = (InternalError, DataLossError)
#: A call that fails for longer than this has met something that does not mend.
PATIENCE_S = 150.0


class CrashLoopError(AssertionError):
    """Something was lost, doubled or damaged, or does not work any more."""


class CannotTryError(RuntimeError):
    """This machine cannot do what the loop needs; the message says what is missing."""


@dataclass
class Figures:
    """What a run did. Times in seconds."""

    kills_server: int = 0
    kills_worker: int = 0
    kills_database: int = 0
    power_cuts: int = 0
    kills_while_starting: int = 0
    kills_at: dict[str, int] = field(default_factory=dict)
    points_not_reached: dict[str, int] = field(default_factory=dict)
    disk_errors: dict[str, int] = field(default_factory=dict)
    drains: int = 0
    appends_acked: int = 0
    appends_repeated: int = 0
    appends_given_up: int = 0
    appends_held_back: int = 0
    turns_acked: int = 0
    turns_stored: int = 0
    deletions_acked: int = 0
    answers: int = 0
    imports_acked: int = 0
    forks_acked: int = 0
    forks_given_up: int = 0
    restores_acked: int = 0
    memories_deleted: int = 0
    verifications: int = 0
    leftovers_seen: int = 0
    seconds: float = 0.0
    by_error: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: While the power is off, or the disk fails, a server may say that it is broken or full.
        self.dark = False

    def shown(self) -> dict[str, object]:
        """What is counted, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def kills(self) -> int:
        """Of everything, power cuts included."""
        return self.kills_server + self.kills_worker + self.kills_database + self.power_cuts

    def add(self, other: Figures) -> None:
        """Counts what another run counted, too."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, dict):
                for name, number in theirs.items():
                    mine[name] = mine.get(name, 0) + number
            else:
                setattr(self, item.name, round(mine + theirs, 1))

    def copy(self) -> Figures:
        """As they are now."""
        taken = Figures()
        taken.add(self)
        return taken

    def excuse(self, error: MemsvcError) -> None:
        """Counts a call that a death cut short. Raises the error when it is none of that."""
        if not isinstance(error, CUT_SHORT) and not (self.dark and isinstance(error, BROKEN)):
            raise error
        count(self.by_error, getattr(error, "reason", "") or type(error).__name__)


def count(counts: dict[str, int], name: str) -> None:
    """One more of that name."""
    counts[name] = counts.get(name, 0) + 1


async def persist(
    call: Callable[[], Awaitable[T]], figures: Figures, rng: random.Random, what: str
) -> T:
    """Makes a call until it succeeds. Raises CrashLoopError when it never does, and
    whatever is no sign of a process that died.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await call()
        except ResourceExhaustedError as error:
            if error.retry_after_s is None and not figures.dark:
                raise
            figures.appends_held_back += 1
            await asyncio.sleep(error.retry_after_s or rng.uniform(0.02, 0.25))
        except MemsvcError as error:
            figures.excuse(error)
            if time.monotonic() > end:
                raise CrashLoopError(f"{what} fails without end: {error}") from error
            await asyncio.sleep(rng.uniform(0.02, 0.25))
