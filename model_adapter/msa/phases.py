"""Where the time of passes goes, for benchmarks. Unless it is measured, it costs nothing."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

#: Called with a phase's name: the context in which it goes on.
Phase = Callable[[str], AbstractContextManager[None]]
_NOTHING = nullcontext()


def unmeasured(_: str) -> AbstractContextManager[None]:
    """What a decoder has unless someone measures."""
    return _NOTHING


class Phases:
    """Seconds and turns of each phase, without those of phases within it.

    The device is waited for whenever a phase begins or ends, so that its time counts where it
    belongs. Phases that would run beside each other then do not: their sum is an upper bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.turns = defaultdict[str, float](float), Counter[str]()
        self._device = device
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures what is done within."""
        self._lap()
        self.turns[name] += 1
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
