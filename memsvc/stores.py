"""Open LMDB environments, and the threads that use them.

LMDB blocks and takes one writer, so each open tenant has one writer thread, and
all share a few reader threads. An environment may be open only once in a
process; the least recently used one is closed when too many are open.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from memsvc.keys import Keys
from storage.check import require_sound_structure
from storage.files import disk_error
from storage.lmdb_env import MapLimits
from storage.lmdb_store import LmdbOptions, LmdbStore
from storage.paths import DataFolder
from storage.store import TenantRemovedError, TenantStore

P = ParamSpec("P")
T = TypeVar("T")

Opener = Callable[[Path], TenantStore]


def lmdb_opener(max_bytes: int, keys: Keys) -> Opener:
    """Opens LMDB environments that grow to max_bytes and no further.

    LMDB trusts the pages of its file, and a damaged one can end the process. So the file
    is looked through before it is opened for the first time (some 5 us a record).
    Raises StoreDamagedError.
    """
    start_bytes = min(MapLimits().start_bytes, max_bytes)
    options = LmdbOptions(limits=MapLimits(start_bytes=start_bytes, max_bytes=max_bytes))
    looked_through: set[Path] = set()

    def open_store(path: Path) -> TenantStore:
        if path not in looked_through:
            require_sound_structure(path)
        store = LmdbStore(path, options, keys.tenant(path.name))
        looked_through.add(path)
        return store

    return open_store


class _Handle:
    """One open tenant. users: calls that hold it now."""

    def __init__(self, tenant_uid: str) -> None:
        self.writer = ThreadPoolExecutor(1, thread_name_prefix=f"lmdb-{tenant_uid[:8]}")
        self.store: asyncio.Future[TenantStore] = asyncio.get_running_loop().create_future()
        self.users = 0
        self.idle = asyncio.Event()

    def enter(self) -> None:
        """One more user."""
        self.users += 1
        self.idle.clear()

    def leave(self) -> None:
        """One user less."""
        self.users -= 1
        if not self.users:
            self.idle.set()


class Stores:
    """The stores of all tenants. Used from one event loop."""

    def __init__(
        self,
        folder: DataFolder,
        open_environments: int,
        reader_threads: int,
        opener: Opener,
    ) -> None:
        self._folder = folder
        self._limit = open_environments
        self._opener = opener
        self._readers = ThreadPoolExecutor(reader_threads, thread_name_prefix="lmdb-read")
        self._handles: OrderedDict[str, _Handle] = OrderedDict()
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._removed: set[str] = set()

    @property
    def open_count(self) -> int:
        """Environments open now; above the limit only while that many are in use."""
        return len(self._handles)

    async def run(
        self,
        tenant_uid: str,
        function: Callable[Concatenate[TenantStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """function(store, ...) in the tenant's writer thread, one at a time."""
        return await self._call(tenant_uid, None, function, *args, **kwargs)

    async def read(
        self,
        tenant_uid: str,
        function: Callable[Concatenate[TenantStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """function(store, ...) in a reader thread. It must not write."""
        return await self._call(tenant_uid, self._readers, function, *args, **kwargs)

    async def remove(self, tenant_uid: str) -> None:
        """Closes and deletes a tenant's environment. Calls of the tenant that are under way
        make no new one: they raise TenantRemovedError. Raises StorageError when something of
        it is left.
        """
        self._removed.add(tenant_uid)
        handle = self._handles.pop(tenant_uid, None)
        if handle is not None:
            self._start_closing(tenant_uid, handle)
        await self._wait_closed(tenant_uid)
        await asyncio.to_thread(_remove, self._folder.tenant(tenant_uid))

    async def close(self) -> None:
        """Closes every environment; calls under way end first."""
        while self._handles:
            self._start_closing(*self._handles.popitem())
        while self._closing:
            await asyncio.wait(set(self._closing.values()))
        await asyncio.to_thread(self._readers.shutdown)

    async def _call(
        self,
        tenant_uid: str,
        executor: Executor | None,
        function: Callable[Concatenate[TenantStore, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        handle = await self._acquire(tenant_uid)
        try:
            store = await asyncio.shield(handle.store)
        except BaseException:
            self._release(handle)
            raise
        running = asyncio.get_running_loop().run_in_executor(
            executor or handle.writer, lambda: function(store, *args, **kwargs)
        )
        # Not in a finally: a cancelled caller leaves, its thread still runs.
        running.add_done_callback(lambda done: self._ended(handle, done))
        return await asyncio.shield(running)

    async def _acquire(self, tenant_uid: str) -> _Handle:
        """The tenant's handle with one more user. Opens it when needed."""
        await self._wait_closed(tenant_uid)
        if tenant_uid in self._removed:
            raise TenantRemovedError(f"the store of tenant {tenant_uid} was removed")
        handle = self._handles.get(tenant_uid)
        if handle is None:
            handle = self._handles[tenant_uid] = _Handle(tenant_uid)
            self._open(tenant_uid, handle)
        self._handles.move_to_end(tenant_uid)
        handle.enter()
        self._close_unused()
        return handle

    def _open(self, tenant_uid: str, handle: _Handle) -> None:
        path = self._folder.tenant(tenant_uid)
        opening = asyncio.get_running_loop().run_in_executor(handle.writer, self._opener, path)

        def opened(done: asyncio.Future[TenantStore]) -> None:
            error = done.exception()
            if error is None:
                handle.store.set_result(done.result())
                return
            handle.store.set_exception(error)
            handle.store.exception()  # seen: no waiter may be left to fetch it
            if self._handles.get(tenant_uid) is handle:
                del self._handles[tenant_uid]
            handle.writer.shutdown(wait=False)

        opening.add_done_callback(opened)

    def _ended(self, handle: _Handle, done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            done.exception()  # seen: its caller may have left
        self._release(handle)

    def _release(self, handle: _Handle) -> None:
        handle.leave()
        self._close_unused()

    def _close_unused(self) -> None:
        """Closes the least recently used until the limit is kept."""
        excess = len(self._handles) - self._limit
        for tenant_uid, handle in list(self._handles.items()):
            if excess <= 0:
                return
            if handle.users == 0 and handle.store.done():
                del self._handles[tenant_uid]
                self._start_closing(tenant_uid, handle)
                excess -= 1

    def _start_closing(self, tenant_uid: str, handle: _Handle) -> None:
        task = asyncio.get_running_loop().create_task(self._close(handle))
        self._closing[tenant_uid] = task
        task.add_done_callback(lambda _: self._closing.pop(tenant_uid, None))

    async def _close(self, handle: _Handle) -> None:
        store = await handle.store
        if handle.users:
            await handle.idle.wait()
        await asyncio.get_running_loop().run_in_executor(handle.writer, store.close)
        handle.writer.shutdown(wait=False)

    async def _wait_closed(self, tenant_uid: str) -> None:
        """An environment must be closed before it can be opened again."""
        while (closing := self._closing.get(tenant_uid)) is not None:
            await asyncio.wait({closing})


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, "a tenant's store could not be removed") from error
