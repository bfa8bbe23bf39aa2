"""Makes blocking classes out of the asyncio ones, for any of their methods.

    core (asyncio)                     made of it (blocking)
    async def f(...) -> X              def f(...) -> X
    async generator                    iterator; closing it closes the generator
    async with                         with
    property, def                      the same
    a result that is a core object     its blocking counterpart

The core runs on an event loop in a thread of its own, one per root object. What
is not public in the core (a leading underscore) is not carried over.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")

#: Blocking counterpart of each core class.
_COUNTERPARTS: dict[type, type[Blocking]] = {}


class Portal:
    """An event loop in a background thread, and calls into it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.name = "memsvc-client"
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether calls are still taken."""
        return not self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs to the end; an interrupt of the waiting thread cancels the work.

        Raises RuntimeError after `close`, or when called from the loop itself.
        """
        if not self.open or threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "The client is closed." if not self.open else "Use AsyncClient here."
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends the loop and its thread. Closing twice is no error."""
        if not self.open:
            return
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Blocking:
    """Root of the made classes: a core object and the portal to where it lives."""

    def __init__(self, core: object, portal: Portal) -> None:
        self._core = core
        self._portal = portal

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._core!r}>"


class BlockingRoot(Blocking):
    """A made class that owns its portal: the constructor takes the core's arguments."""

    _core_class: type[object]

    def __init__(self, *arguments: object, **options: object) -> None:
        self._open(functools.partial(self._core_class, *arguments, **options))

    def _open(self, make: Callable[[], object]) -> None:
        async def in_loop() -> object:
            return make()

        portal = Portal()
        try:
            core = portal.run(in_loop())
        except BaseException:
            portal.close()
            raise
        super().__init__(core, portal)

    def close(self) -> None:
        """Closes the core and ends its thread. Closing twice is no error."""
        if self._portal.open:
            try:
                self._portal.run(self._core.close())  # type: ignore[attr-defined]  # every root core has it
            finally:
                self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def blocking(core: type, name: str, *, root: bool = False) -> type[Any]:
    """Makes the blocking counterpart of a core class, and remembers it.

    Typed as Any: what it offers to a type checker stands in sync.pyi, which
    `memsvc.client.stub` writes from the core's signatures.
    """
    base = BlockingRoot if root else Blocking
    members: dict[str, object] = {"__doc__": core.__doc__, "_core_class": core}
    for key, member in vars(core).items():
        if not key.startswith("_") and not hasattr(base, key):
            members[key] = _counterpart(member)
    made = type(name, (base,), members)
    _COUNTERPARTS[core] = made
    return made


def _counterpart(member: object) -> object:
    if isinstance(member, property) and member.fget:
        return property(_plain(member.fget))
    if isinstance(member, classmethod):
        return classmethod(_constructor(member.__func__))
    if inspect.isasyncgenfunction(member):
        return _iterating(member)
    if inspect.iscoroutinefunction(member):
        return _waiting(member)
    if inspect.isfunction(member):
        return _plain(member)
    return member


def _dress(owner: Blocking, result: object) -> object:
    made = _COUNTERPARTS.get(type(result))
    return made(result, owner._portal) if made else result


def _plain(method: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(method)
    def call(self: Blocking, *arguments: object, **options: object) -> object:
        return _dress(self, method(self._core, *arguments, **options))

    return call


def _waiting(method: Callable[..., Coroutine[Any, Any, object]]) -> Callable[..., object]:
    @functools.wraps(method)
    def call(self: Blocking, *arguments: object, **options: object) -> object:
        return _dress(self, self._portal.run(method(self._core, *arguments, **options)))

    return call


def _iterating(
    method: Callable[..., AsyncGenerator[object, None]],
) -> Callable[..., Iterator[object]]:
    @functools.wraps(method)
    def call(self: Blocking, *arguments: object, **options: object) -> Iterator[object]:
        stream = method(self._core, *arguments, **options)
        try:
            while True:
                try:
                    item = self._portal.run(_next(stream))
                except StopAsyncIteration:
                    return
                yield _dress(self, item)
        finally:
            if self._portal.open:
                self._portal.run(stream.aclose())

    return call


async def _next(stream: AsyncGenerator[Result, None]) -> Result:
    return await anext(stream)


def _constructor(function: Callable[..., object]) -> Callable[..., BlockingRoot]:
    @functools.wraps(function)
    def call(made: type[BlockingRoot], *arguments: object, **options: object) -> BlockingRoot:
        self = made.__new__(made)
        self._open(functools.partial(function, made._core_class, *arguments, **options))
        return self

    return call
