"""Named places at which a crash is worth trying. Nothing happens at them unless a test arms one.

`reach(point)` stands behind each step that leaves something for recovery to finish or
undo. A server is armed by its setting `failpoint`, a test in its own process by `armed`.
While nothing is armed a point costs one comparison.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum


class Failpoint(StrEnum):
    """The places, in the order in which a call comes by them. Each is named for what is done."""

    # Any write of the store (LMDB) and of the catalog (SQL).
    STORE_UNCOMMITTED = "store-uncommitted"
    STORE_COMMITTED = "store-committed"
    CATALOG_UNCOMMITTED = "catalog-uncommitted"
    CATALOG_COMMITTED = "catalog-committed"
    # Keys at rest: made with a memory's first record, replaced when documents are deleted.
    KEY_CREATED = "key-created"
    KEYS_STORED = "keys-stored"
    KEY_HALF_WRITTEN = "key-half-written"
    KEY_REPLACED = "key-replaced"
    KEY_DESTROYED = "key-destroyed"
    # AppendTurns and PutDocuments.
    APPEND_LOCKED = "append-locked"
    APPEND_STORED = "append-stored"
    APPEND_COMMITTED = "append-committed"
    # DeleteDocuments.
    DELETE_COMMITTED = "delete-committed"
    DELETE_PURGED = "delete-purged"
    DELETE_EVICTED = "delete-evicted"
    DELETE_FORGOTTEN = "delete-forgotten"
    # DeleteMemory.
    DROP_MARKED = "drop-marked"
    DROP_PURGED = "drop-purged"
    DROP_EVICTED = "drop-evicted"
    DROP_FINISHED = "drop-finished"
    # ForkMemory and RestoreMemory.
    FORK_STORED = "fork-stored"
    FORK_COMMITTED = "fork-committed"
    ROLLBACK_COMMITTED = "rollback-committed"
    # The encoding of a batch, and the rebuilding of damaged blocks.
    ENCODE_READ = "encode-read"
    ENCODE_RECEIVED = "encode-received"
    ENCODE_STORED = "encode-stored"
    ENCODE_COMMITTED = "encode-committed"
    REBUILD_REWOUND = "rebuild-rewound"
    REBUILD_DELETED = "rebuild-deleted"
    # ImportMemory.
    IMPORT_RECEIVED = "import-received"
    IMPORT_CREATED = "import-created"
    IMPORT_STORED = "import-stored"
    IMPORT_APPENDED = "import-appended"
    IMPORT_BLOCKS_STORED = "import-blocks-stored"
    IMPORT_ENCODED = "import-encoded"
    IMPORT_ACTIVATED = "import-activated"
    # The start of a server.
    RECONCILE_DROPPED = "reconcile-dropped"
    RECONCILE_CLEANED = "reconcile-cleaned"
    RECONCILE_FORGOTTEN = "reconcile-forgotten"
    RECONCILE_REWOUND = "reconcile-rewound"
    # `memsvc backup` and `memsvc restore`.
    BACKUP_COPIED = "backup-copied"
    BACKUP_SEALED = "backup-sealed"
    RESTORE_COPIED = "restore-copied"
    RESTORE_FILLED = "restore-filled"
    # `memsvc init` and `memsvc migrate`.
    MIGRATE_UNCOMMITTED = "migrate-uncommitted"
    MIGRATE_COMMITTED = "migrate-committed"


Hook = Callable[[Failpoint], None]

_hook: Hook | None = None


def reach(point: Failpoint) -> None:
    """Says that the step is done. May not return, when a test wants it so."""
    if _hook is not None:
        _hook(point)


def arm(hook: Hook | None) -> None:
    """Has every point call `hook` from now on, in whatever thread comes by; None: none again."""
    global _hook  # noqa: PLW0603 - one process dies once
    _hook = hook


@contextmanager
def armed(hook: Hook) -> Iterator[None]:
    """`arm` for the length of a with block."""
    arm(hook)
    try:
        yield
    finally:
        arm(None)


def parse(setting: str) -> tuple[Failpoint, int]:
    """The point and the pass of "NAME" or "NAME:PASS". Raises ValueError."""
    name, _, number = setting.partition(":")
    nth = int(number or 1)
    if nth < 1:
        raise ValueError("passes are counted from 1")
    return Failpoint(name), nth


def die_at(point: Failpoint, nth: int = 1) -> Hook:
    """A hook by which the process ends at the nth pass of a point, as by kill -9."""
    passes = itertools.count(1)

    def hook(reached: Failpoint) -> None:
        if reached is point and next(passes) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook
