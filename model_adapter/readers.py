"""Read handles on the stores of many tenants, a bounded number open at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from storage.store import BlockReader, StoreNotFoundError

#: Opens the store of a tenant (its uid in hex). Raises StoreNotFoundError.
OpenReader = Callable[[str], BlockReader]


@dataclass
class _Open:
    reader: BlockReader
    users: int = 0
    #: Closed by its last user instead of being kept.
    closing: bool = False


class Readers:
    """Lends read handles to threads. Handles in use are never closed under their users."""

    def __init__(self, open_reader: OpenReader, max_open: int = 64) -> None:
        self._open_reader = open_reader
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()

    @contextmanager
    def use(self, tenant: str) -> Iterator[BlockReader | None]:
        """The tenant's store; None when it has none yet."""
        try:
            handle = self._take(tenant)
        except StoreNotFoundError:
            yield None
            return
        try:
            yield handle.reader
        finally:
            self._give_back(handle)

    def close_tenant(self, tenant: str) -> None:
        """Lets go of the tenant's handle, so that a deleted store takes no disk space; with
        an empty name of every tenant's.
        """
        with self._lock:
            for name, handle in self._open.items():
                if tenant in ("", name):
                    handle.closing = True
            self._close_unused()

    def close(self) -> None:
        """Closes everything that is not in use; the rest when it is given back."""
        self.close_tenant("")

    def _take(self, tenant: str) -> _Open:
        with self._lock:
            handle = self._open.get(tenant)
            if handle is None:
                # Opened under the lock: a store may be opened only once per process.
                handle = self._open[tenant] = _Open(self._open_reader(tenant))
            self._open.move_to_end(tenant)
            handle.closing = False
            handle.users += 1
            self._close_unused()
            return handle

    def _give_back(self, handle: _Open) -> None:
        with self._lock:
            handle.users -= 1
            self._close_unused()

    def _close_unused(self) -> None:
        """Closes what is to be closed, and the oldest while there are too many."""
        for tenant, handle in list(self._open.items()):
            surplus = len(self._open) > self._max_open
            if not handle.users and (handle.closing or surplus):
                del self._open[tenant]
                handle.reader.close()
