"""Stops a server's own method where a test wants something else to come between."""

from __future__ import annotations

import asyncio
from typing import Any


class Held:
    """A method of an object, stopped before its work or after it until told to go on."""

    def __init__(self, owner: Any, method: str, *, after: bool = False) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self._owner, self._method = owner, method
        real = getattr(owner, method)

        async def stop() -> None:
            self.reached.set()
            await self.go_on.wait()

        async def held(*args: Any, **kwargs: Any) -> Any:
            if not after:
                await stop()
            result = await real(*args, **kwargs)
            if after:
                await stop()
            return result

        setattr(owner, method, held)

    def let_others_pass(self) -> None:
        """Calls from now on are not stopped; the one that is stays where it is."""
        delattr(self._owner, self._method)
