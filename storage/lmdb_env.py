"""One LMDB environment: opened, grown and closed safely, its errors translated.

Rules kept here, so that no caller can break them:
 - Writes are durable when they return: LMDB's default sync, nothing else.
 - A read transaction lives inside `read` and no longer; views into the map die with it.
 - The map is never moved under a transaction: growth waits for this process's readers.
 - One writer: an advisory lock on `writer.lock`, held while the environment is open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lmdb

from storage.failpoints import Failpoint, reach
from storage.files import FULL, disk_error, sync_file, sync_folder
from storage.store import (
    StorageError,
    StorageFullError,
    StoreBusyError,
    StoreNotFoundError,
    StoreUnavailableError,
)

_T = TypeVar("_T")
_MIB = 2**20
_READER_CHECK_S = 60.0
_MAX_RESIZES = 8
#: Pages of the tree that a commit writes besides its values.
_SLACK_BYTES = 256 * 1024

DATA_FILE = "data.mdb"
WRITER_LOCK_FILE = "writer.lock"


@dataclass(frozen=True)
class MapLimits:
    """Sizes of the memory map, in bytes. It costs address space, not disk.

    start_bytes: of a new environment. max_bytes: growth ends here and writes raise
    StorageFullError; deletions may use reserve_bytes more, as they too need pages.
    """

    start_bytes: int = 64 * _MIB
    max_bytes: int = 64 * 1024 * _MIB
    reserve_bytes: int = 64 * _MIB


class _Gate:
    """Many transactions at once, or one resize."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._resizing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            while self._resizing:
                self._condition.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                if not self._inside:
                    self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            while self._resizing:
                self._condition.wait()
            self._resizing = True
            while self._inside:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._resizing = False
                self._condition.notify_all()


class Environment:
    """One tenant's LMDB environment in the folder `path`. Threads may share it.

    Raises at opening: StoreNotFoundError (readonly, nothing there), StoreBusyError
    (another writer, or open in this process already), StorageFullError, StorageError.
    """

    def __init__(self, path: Path, *, readonly: bool, limits: MapLimits | None = None) -> None:
        self.path = path
        self._readonly = readonly
        self._limits = limits or MapLimits()
        self._gate = _Gate()
        self._writing = threading.Lock()
        self._reader_check_due = 0.0
        #: A failed commit closed the environment, and it could not be opened again.
        self._lost = False
        self._closed = False
        self._writer_lock: int | None = None
        if readonly:
            if not (path / DATA_FILE).is_file():
                raise StoreNotFoundError(f"no store at {path.name}")
        else:
            self._prepare_folder()
        try:
            self._env = self._open()
        except BaseException:
            self._unlock()
            raise

    def _prepare_folder(self) -> None:
        new = not (self.path / DATA_FILE).exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(
                self.path / WRITER_LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise disk_error(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreBusyError(f"store {self.path.name} has another writer") from None
        self._writer_lock = lock
        if new:
            # The folder's own entry must outlive a power cut as well as its files do.
            sync_folder(self.path.parent)

    def _open(self) -> lmdb.Environment:
        data = self.path / DATA_FILE
        size = data.stat().st_size if data.exists() else 0
        # 0 takes the size that the writer left in the file.
        start = 0 if self._readonly else max(self._limits.start_bytes, _pages(size * 5 // 4))
        with _translated():
            env = lmdb.open(
                str(self.path),
                map_size=start,
                readonly=self._readonly,
                create=not self._readonly,
                mode=0o600,
                # Scans prefetch for themselves (storage/lmdb_pages.py); for single reads
                # the kernel's read-ahead would read many times what is asked for.
                readahead=False,
                max_spare_txns=4,
            )
        if not self._readonly:
            sync_folder(self.path)
        return env

    @property
    def map_bytes(self) -> int:
        """Size of the map now."""
        with self._gate.shared():
            self._check_open()
            return int(self._env.info()["map_size"])

    def read(self, work: Callable[[lmdb.Transaction], _T]) -> _T:
        """Runs `work` in a read transaction whose values are views; they end with it.

        `work` must not wait for anything. Raises StorageError.
        """
        self._recover()
        for attempt in range(_MAX_RESIZES):
            try:
                with self._gate.shared():
                    self._check_open()
                    with _translated(), self._env.begin(buffers=True) as transaction:
                        return work(transaction)
            except lmdb.MapResizedError:
                self._follow_growth()
            except lmdb.ReadersFullError:
                # A killed reader keeps its slot until someone looks.
                if attempt or not self.free_stale_readers():
                    raise StoreBusyError(f"store {self.path.name}: no reader slot left") from None
        raise StorageError(f"store {self.path.name} grows faster than it can be opened")

    @contextmanager
    def snapshot(self) -> Iterator[Callable[[Path], None]]:
        """What the environment holds now, until the with block ends, however much is written.

        Gives a function that writes it, without free pages and durably, as `data.mdb` of that
        new folder. Raises StorageError.
        """
        with ExitStack() as held:
            transaction = self._begin_view(held)

            def copy(folder: Path) -> None:
                folder.mkdir(mode=0o700, parents=True)
                with _translated():
                    self._env.copy(str(folder), compact=True, txn=transaction)
                sync_file(folder / DATA_FILE)
                sync_folder(folder)

            yield copy

    def _begin_view(self, held: ExitStack) -> lmdb.Transaction:
        """A read transaction that lasts as long as `held`, and keeps the map as it is."""
        for _ in range(_MAX_RESIZES):
            with suppress(lmdb.MapResizedError), ExitStack() as attempt:
                attempt.enter_context(self._gate.shared())
                self._check_open()
                with _translated():
                    transaction: lmdb.Transaction = attempt.enter_context(self._env.begin())
                held.push(attempt.pop_all())
                return transaction
            self._follow_growth()
        raise StorageError(f"store {self.path.name} grows faster than it can be opened")

    def _follow_growth(self) -> None:
        """The writer's process has grown the file past this map."""
        with self._gate.exclusive(), _translated():
            self._check_open()
            self._env.set_mapsize(0)

    def write(
        self,
        work: Callable[[lmdb.Transaction], _T],
        expected_bytes: int = 0,
        *,
        frees: bool = False,
    ) -> _T:
        """Runs `work` in a write transaction: all of it is durable on return, or none.

        `work` runs again after the map has grown, so it must not act elsewhere.
        expected_bytes: what it will write, as a hint. frees: it deletes, so it may
        use the reserve. Raises StorageFullError, StorageError.
        """
        with self._writing:
            self._recover()
            self._check_readers_now_and_then()
            while True:
                try:
                    return self._write_once(work, expected_bytes)
                except lmdb.MapFullError:
                    self._grow(expected_bytes, frees)

    def _write_once(self, work: Callable[[lmdb.Transaction], _T], expected_bytes: int) -> _T:
        try:
            with self._gate.shared():
                self._check_open()
                with _translated(), self._env.begin(write=True, buffers=True) as transaction:
                    result = work(transaction)
                    reach(Failpoint.STORE_UNCOMMITTED)
                reach(Failpoint.STORE_COMMITTED)
                return result
        except StorageError as error:
            if isinstance(error.__cause__, lmdb.Error):
                # A failed commit may leave the environment unusable: take a new one.
                self._reopen()
                # LMDB reports a write that a full disk cut short as an I/O error.
                if os.strerror(errno.EIO) in str(error) and self._is_full(expected_bytes):
                    raise StorageFullError(f"disk is full: {error}") from error.__cause__
            raise

    def _is_full(self, expected_bytes: int) -> bool:
        """True when the disk, a quota or the process's limit leaves no room for such a write."""
        room = expected_bytes + expected_bytes // 2 + _SLACK_BYTES
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (self.path / DATA_FILE).stat().st_size
        if limit != resource.RLIM_INFINITY and size + room > limit:
            return True
        try:
            with tempfile.TemporaryFile(dir=self.path) as probe:
                os.posix_fallocate(probe.fileno(), 0, room)
        except OSError as error:
            return error.errno in FULL
        return False

    def _grow(self, expected_bytes: int, frees: bool) -> None:
        ceiling = _pages(self._limits.max_bytes + (self._limits.reserve_bytes if frees else 0))
        with self._gate.exclusive():
            self._check_open()
            now = int(self._env.info()["map_size"])
            if now >= ceiling:
                raise StorageFullError(f"store {self.path.name}: map of {now} bytes is full")
            with _translated():
                self._env.set_mapsize(min(ceiling, _pages(max(2 * now, now + 2 * expected_bytes))))

    def _reopen(self) -> None:
        with self._gate.exclusive():
            if not self._closed:
                self._env.close()
                self._lost = True
                self._env = self._open()
                self._lost = False

    def _recover(self) -> None:
        """Opens again what could not be opened after a failed commit: the disk may be back."""
        if self._lost:
            with self._gate.exclusive():
                if self._lost and not self._closed:
                    self._env = self._open()
                    self._lost = False

    def _check_readers_now_and_then(self) -> None:
        now = time.monotonic()
        if now >= self._reader_check_due:
            self._reader_check_due = now + _READER_CHECK_S
            self.free_stale_readers()

    def free_stale_readers(self) -> int:
        """Frees the slots of killed readers, which else keep old pages alive. Returns how many."""
        with self._gate.shared(), _translated():
            self._check_open()
            return int(self._env.reader_check())

    def _check_open(self) -> None:
        if self._closed or self._lost:
            raise StoreUnavailableError(f"store {self.path.name} is closed")

    def close(self) -> None:
        """Waits for transactions, then frees the map and the lock. Again is no error."""
        with self._writing, self._gate.exclusive():
            if not self._closed:
                self._closed = True
                if not self._lost:
                    self._env.close()
                self._unlock()

    def _unlock(self) -> None:
        if self._writer_lock is not None:
            os.close(self._writer_lock)
            self._writer_lock = None


def _pages(size: int) -> int:
    return -(-size // 4096) * 4096


@contextmanager
def _translated() -> Iterator[None]:
    """Turns LMDB's errors into ours, but for those that the caller answers by trying again."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError, lmdb.ReadersFullError):
        raise
    except lmdb.DiskError as error:
        raise StorageFullError(f"disk is full: {error}") from error
    except lmdb.Error as error:
        if "already open" in str(error):
            raise StoreBusyError(str(error)) from error
        raise disk_error(error) from error
