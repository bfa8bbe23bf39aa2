"""What all killers are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

#: Lets the clients work for a random while.
Live = Callable[[], Awaitable[None]]


class Killer:
    """Base of them all. kill(): one kill, after which everything runs."""

    async def kill(self) -> None:
        """Raises CrashLoopError when something does not come back."""
        raise NotImplementedError

    async def rest(self) -> None:
        """Makes sure that nothing dies from here on until the next kill."""
