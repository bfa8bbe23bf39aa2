"""What all killers are."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from tests.fault.figures import Figures
from tests.fault.scene import Scene

#: Lets the clients work for a random while.
Live = Callable[[], Awaitable[None]]


class Killer(ABC):
    """Base of them all."""

    @abstractmethod
    async def kill(self) -> None:
        """One kill, after which everything runs. Raises CrashLoopError when it does not."""

    @abstractmethod
    async def rest(self) -> None:
        """Makes sure that nothing dies from here on until the next kill."""


class SceneKiller(Killer):
    """Kills something of the scene."""

    def __init__(self, scene: Scene, rng: random.Random, figures: Figures, live: Live) -> None:
        self._scene = scene
        self._rng = rng
        self._figures = figures
        self._live = live

    async def rest(self) -> None:
        """Nothing dies unless kill() is called."""
