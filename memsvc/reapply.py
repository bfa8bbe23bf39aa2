"""Deletes again, in a folder that was just restored, what was deleted after its backup.

A backup that is older than a deletion brings back what was deleted, and the keys to it. The
receipts of deletions, kept apart from the backup, say what that is. Only receipts signed by
the same server count: who could forge one could have anything deleted. Only those issued
after the backup was begun do: what is older is gone from the backup, and its numbers may
have been given out again since an earlier restore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memsvc.application import Application
from memsvc.receipts import ReceiptError, receipt_bytes, verify_receipt
from memsvc.reconcile import reconcile
from storage.catalog import MemoryRow, MemoryState, NotFoundError


@dataclass(frozen=True)
class Deletion:
    """One receipt, verified. documents: as the statement has them; None for all."""

    id: str
    issued_at_us: int
    tenant_uid: str
    memory_uid: str
    documents: str | None
    receipt: bytes


@dataclass
class Reapplied:
    """What was deleted again. receipts: that were issued after the backup was begun.

    left: ids of receipts that only count their documents, too many to be named one by one.
    """

    receipts: int = 0
    tenants: int = 0
    memories: int = 0
    documents: int = 0
    left: list[str] = field(default_factory=list)


def read_deletions(folder: Path, public_key: str, since_us: int) -> list[Deletion]:
    """Deletions from `since_us` on, oldest first, of the receipts in a folder and those below.

    Raises ReceiptError naming a file that is no receipt of the server with this key.
    """
    if not folder.is_dir():
        raise ReceiptError(f"{folder} is no folder")
    found: dict[str, Deletion] = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            receipt = receipt_bytes(path)
            said = verify_receipt(receipt, public_key)
        except ReceiptError as error:
            raise ReceiptError(f"{path}: {error}") from error
        deletion = _deletion(path.stem, receipt, said)
        if deletion.issued_at_us >= since_us:
            found[str(said["id"])] = deletion
    return sorted(found.values(), key=lambda one: one.issued_at_us)


def _deletion(name: str, receipt: bytes, said: Mapping[str, object]) -> Deletion:
    issued_at_us, documents = said["issued_at_us"], said["documents"]
    assert isinstance(issued_at_us, int)  # Signed by this code.
    return Deletion(
        name,
        issued_at_us,
        str(said["tenant"]),
        str(said["memory"]),
        None if documents is None else str(documents),
        receipt,
    )


async def reapply(application: Application, deletions: list[Deletion]) -> Reapplied:
    """Deletes again, with receipts of its own. What is gone already is no error."""
    done = Reapplied(receipts=len(deletions))
    for deletion in deletions:
        if not deletion.memory_uid:
            await application.catalog.begin_delete_tenant(deletion.tenant_uid)
            continue
        memory = await _memory(application, deletion)
        if memory is None:
            continue
        if deletion.documents is None:
            await application.writes.delete_memory(memory, None)
            done.memories += 1
            continue
        numbers = _numbers(deletion.documents)
        if numbers is None:
            done.left.append(deletion.id)
            continue
        done.documents += await _delete_documents(application, memory, numbers)
    # Finishes what was only marked: tenants with everything in them.
    report = await reconcile(application)
    done.tenants += report.tenants_deleted
    done.memories += report.memories_deleted
    return done


async def _memory(application: Application, deletion: Deletion) -> MemoryRow | None:
    try:
        memory = await application.catalog.get_memory_by_uid(deletion.memory_uid)
    except NotFoundError:
        return None
    wanted = memory.tenant_uid == deletion.tenant_uid and memory.state is MemoryState.ACTIVE
    return memory if wanted else None


async def _delete_documents(
    application: Application, memory: MemoryRow, numbers: Iterator[range]
) -> int:
    """How many of them were there."""
    catalog = application.catalog
    live: list[int] = []
    for run in numbers:
        last = min(run.stop - 1, memory.last_number)
        if run.start <= last:
            live += await catalog.live_numbers(memory.uid, run.start, last)
    if live:
        await application.deletions.remove_documents(
            memory,
            live,
            lambda: catalog.commit_delete_documents(memory.uid, memory.revision, live, None),
        )
    return len(live)


def _numbers(runs: str) -> Iterator[range] | None:
    """Of "1-3,7". None for a count in words."""
    if " " in runs:
        return None
    ends = (run.partition("-") for run in runs.split(","))
    return (range(int(first), int(last or first) + 1) for first, _, last in ends)


def keep(deletions: list[Deletion], receipts: Path) -> None:
    """Puts the receipts where the restored server keeps its own."""
    for deletion in deletions:
        folder = receipts / deletion.tenant_uid
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{deletion.id}.json"
        if not path.exists():
            path.write_bytes(deletion.receipt)
            path.chmod(0o600)
