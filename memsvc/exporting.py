"""A memory as one archive: a consistent view of one revision while writes go on.

Documents never change, so a revision is the list of its live documents. It is
read under the memory's write lock, in a moment; everything after goes on beside
writes. A document that is deleted meanwhile makes the view impossible: the
export is then made anew, of the newer revision.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memsvc import errors
from memsvc.application import Application
from memsvc.limits import Turns
from memsvc.staging import StagingKey
from memsvc.writes import memory_uid
from storage.archive import (
    ArchivedEncoding,
    ArchivedPacking,
    ArchivedRevision,
    ArchiveSourceError,
    Manifest,
    Signer,
    export_memory,
    stage_archive,
)
from storage.catalog import MemoryRow, MemoryState, NotFoundError
from storage.store import CorruptRecordError, TenantStore

_TRIES = 3
_REVISIONS = 1000
#: An export works for so long before it asks whether its tenant may do more.
_SLICE_S = 0.01

log = logging.getLogger(__name__)


class _StoppedError(Exception):
    """The caller has left."""


class _Slices:
    """Divides a thread's work for a tenant into slices, each counted and waited for.

    The thread works beside the event loop and slows it down: an export takes as much of
    the server's time as the calls of its tenant do.
    """

    def __init__(self, turns: Turns, tenant_uid: str) -> None:
        """In the event loop's thread."""
        self._turns = turns
        self._tenant_uid = tenant_uid
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._began = 0.0

    def stop(self) -> None:
        """The caller leaves: the thread ends at its next item."""
        self._stop.set()

    def begin(self) -> None:
        """In the working thread: it has begun."""
        self._began = time.monotonic()

    def pause(self) -> None:
        """In the working thread, between two items."""
        if self._stop.is_set():
            raise _StoppedError
        if time.monotonic() - self._began >= _SLICE_S:
            self.end()
            self.begin()

    def end(self) -> None:
        """In the working thread: counts what was done since it began, and waits for its turn."""
        waited = self._turns.worked(self._tenant_uid, time.monotonic() - self._began)
        asyncio.run_coroutine_threadsafe(waited, self._loop).result()


@dataclass(frozen=True)
class View:
    """One revision of a memory: its row, its live documents, its past, its encodings."""

    memory: MemoryRow
    numbers: Sequence[int]
    revisions: Sequence[ArchivedRevision]
    encodings: tuple[ArchivedEncoding, ...]

    def manifest(self) -> Manifest:
        """What the archive says of itself."""
        row = self.memory
        return Manifest(
            created_at_us=time.time_ns() // 1000,
            display_name=row.display_name,
            packing=ArchivedPacking(
                row.packing.mode.value, row.packing.window_turns, row.packing.max_document_bytes
            ),
            revision=row.revision,
            last_number=row.last_number,
            labels=row.labels,
            encodings=self.encodings,
        )


async def stage_export(
    application: Application,
    memory: MemoryRow,
    path: Path,
    key: StagingKey,
    *,
    with_blocks: bool,
    signed: bool = False,
) -> int:
    """Writes the archive to path, encrypted by key; returns its bytes.

    signed: by this server's key.

    A memory that has a damaged block is exported without blocks. Raises MEMORY_NOT_FOUND
    when it is deleted meanwhile, OVERLOADED when documents keep being deleted under it,
    STORAGE_FULL, CorruptRecordError for a damaged text.
    """
    slices = _Slices(application.limiter.turns, memory.tenant_uid)
    signer = application.receipts if signed else None
    try:
        for _ in range(_TRIES):
            seen = time.monotonic()
            view = await take_view(application, memory, with_blocks=with_blocks)
            try:
                size = await application.stores.read(
                    memory.tenant_uid, _stage, view, path, key, slices, signer
                )
                # What was deleted meanwhile may have been there to be read.
                if not application.deletions.owed.deleted_since(memory.uid, seen):
                    return size
            except ArchiveSourceError:
                continue
            except CorruptRecordError:
                if not view.encodings:
                    raise
                # A block can be made again: it costs the archive its blocks, not its texts.
                log.error("a block of memory %s is damaged; exported without", memory.uid)
                with_blocks = False
    finally:
        # The thread outlives a cancelled caller by one item.
        slices.stop()
    raise errors.overloaded()


async def take_view(application: Application, memory: MemoryRow, *, with_blocks: bool) -> View:
    """The memory's revision of now. Raises MEMORY_NOT_FOUND."""
    catalog = application.catalog
    async with application.writes.locks.exclusive(memory.tenant_uid, memory.memory_id):
        row = await current(application, memory)
        numbers = await catalog.live_numbers(row.uid, 1, row.last_number)
    encodings: list[ArchivedEncoding] = []
    for encoding in await catalog.list_encodings(row.uid) if with_blocks else ():
        model = await catalog.get_model(encoding.model_id)
        if model.identity == encoding.identity:
            encodings.append(ArchivedEncoding(model.model_id, model.identity, model.layout))
    revisions = await _revisions(application, row)
    return View(await application.fields.opened(row), numbers, revisions, tuple(encodings))


async def _revisions(application: Application, row: MemoryRow) -> list[ArchivedRevision]:
    """Up to the row's; they never change, so no lock is held."""
    found: list[ArchivedRevision] = []
    after = 0
    while after < row.revision:
        page = await application.catalog.revisions_after(row.uid, after, row.revision, _REVISIONS)
        if not page:
            break
        after = page[-1].revision
        found += [
            ArchivedRevision(
                one.revision,
                one.created_us,
                one.documents_added,
                one.documents_removed,
                one.last_number,
            )
            for one in page
        ]
    return found


async def current(application: Application, memory: MemoryRow) -> MemoryRow:
    """The memory's row as it is now. Raises MEMORY_NOT_FOUND once it is deleted."""
    try:
        row = await application.catalog.get_memory_by_uid(memory.uid)
    except NotFoundError as error:
        raise errors.memory_not_found() from error
    if row.state is MemoryState.DELETING:
        raise errors.memory_not_found()
    return row


def _stage(  # noqa: PLR0917 - passed on to a thread as they are
    store: TenantStore,
    view: View,
    path: Path,
    key: StagingKey,
    slices: _Slices,
    signer: Signer | None,
) -> int:
    slices.begin()
    pieces = export_memory(
        store,
        memory_uid(view.memory),
        view.manifest(),
        view.numbers,
        view.revisions,
        signer=signer,
        pause=slices.pause,
    )
    size = stage_archive(path, key.encrypted(_pausing(pieces, slices)))
    # What was packed since the last item, which may be nearly all of a small memory.
    slices.end()
    return size


def _pausing(pieces: Iterable[bytes], slices: _Slices) -> Iterator[bytes]:
    """With a pause after each: a whole member is packed between two items."""
    for piece in pieces:
        yield piece
        slices.pause()
