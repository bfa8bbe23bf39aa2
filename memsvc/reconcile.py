"""What a crash left behind is finished or undone, before the server takes calls.

Every step can be repeated: a crash in the middle of it, or nothing to do, is no
different from a first run. The order is that of trust. The catalog says what
exists; LMDB is made to agree with it; watermarks are made to agree with LMDB.

    memories being deleted            deleted to the end
    tenants being deleted             deleted to the end
    memories being imported           deleted: nobody was told of them
    keys: of unknown memories         destroyed
    store: unknown memories           removed
    store: numbers above last_number  removed: an append that was never acknowledged
    store: removed documents          removed, then forgotten by the catalog
    store: encodings of no model      removed: blocks of replaced weights
    catalog: watermark over a gap     rewound to the gap, which is encoded again
    catalog: document without text    reported: nothing can bring it back
    store: damaged below its records  reported, and left alone

Staging files are gone by then: the server empties their folder when it takes hold of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from memsvc.application import Application
from memsvc.deletion import DeletionUnfinishedError
from memsvc.writes import memory_uid
from storage.catalog import EncodingRow, MemoryRow, MemoryState, TenantRow
from storage.failpoints import Failpoint, reach
from storage.store import EncodingId, MemoryUid, StoreDamagedError, TenantStore

log = logging.getLogger(__name__)

_PAGE = 1000


@dataclass
class Report:
    """What was done. Counts, and for what is lost the memory's uid and the numbers.

    damaged_stores: uids of tenants whose store cannot be opened.
    """

    memories_deleted: int = 0
    tenants_deleted: int = 0
    orphan_keys: int = 0
    imports_undone: int = 0
    orphan_memories: int = 0
    orphan_documents: int = 0
    removed_documents: int = 0
    foreign_encodings: int = 0
    rewound_encodings: int = 0
    damaged_stores: list[str] = field(default_factory=list)
    lost_documents: dict[str, list[int]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether there was nothing to do."""
        return self == Report()


@dataclass(frozen=True)
class _Expected:
    """What the catalog says of one memory."""

    memory: MemoryUid
    last_number: int
    live: frozenset[int]
    removed: frozenset[int]
    encodings: frozenset[EncodingId]


@dataclass(frozen=True)
class _Held:
    """What the store held of one memory, after it was cleaned."""

    documents: frozenset[int]
    blocks: dict[EncodingId, frozenset[int]]
    orphans: int
    foreign: int


async def reconcile_tenant(application: Application, tenant: TenantRow) -> None:
    """Runs every step for one tenant, before anything else is done for it. Raises StorageError,
    CatalogError.
    """
    report = Report()
    await _finish_deletions(application, report, tenant.uid)
    if tenant.deleting_us is not None:
        await _finish_tenant(application, tenant, report)
    else:
        await _try_reconcile(application, tenant, report)
    if not report.clean:
        log.warning("reconciled: %s", report)


async def reconcile(application: Application) -> Report:
    """Runs every step. Call it before serving and before encoding starts."""
    report = Report()
    await _finish_deletions(application, report)
    await _finish_tenants(application, report)
    async for tenant in iterate_tenants(application):
        await _try_reconcile(application, tenant, report)
    if not report.clean:
        log.warning("reconciled: %s", report)
    return report


async def _try_reconcile(application: Application, tenant: TenantRow, report: Report) -> None:
    try:
        await _reconcile_tenant(application, tenant, report)
    except StoreDamagedError as error:
        # Its calls are refused with DATA_LOSS; the other tenants' are served.
        log.error("%s", error)
        report.damaged_stores.append(tenant.uid)
        # A worker may find more sound in it than was found here.
        async for memory in _memories(application, tenant):
            if await application.catalog.removed_numbers(memory.uid):
                application.deletions.owed.note(memory)


async def _finish_deletions(application: Application, report: Report, tenant_uid: str = "") -> None:
    """tenant_uid: empty for those of all tenants."""
    catalog = application.catalog
    for memory in await catalog.memories_in_state(MemoryState.DELETING, tenant_uid):
        report.memories_deleted += await _purge(application, memory)
    for memory in await catalog.memories_in_state(MemoryState.IMPORTING, tenant_uid):
        row = await catalog.begin_delete_memory(
            memory.tenant_uid, memory.memory_id, None, uid=memory.uid
        )
        report.imports_undone += await _purge(application, row)
    reach(Failpoint.RECONCILE_DROPPED)


async def _finish_tenants(application: Application, report: Report) -> None:
    """Tenants whose deletion a crash cut short. Nothing serves yet, so nothing is added."""
    for tenant in await application.catalog.tenants_being_deleted():
        await _finish_tenant(application, tenant, report)


async def _finish_tenant(application: Application, tenant: TenantRow, report: Report) -> None:
    catalog = application.catalog
    purged = [
        await _purge(
            application,
            await catalog.begin_delete_memory(tenant.uid, memory.memory_id, None),
        )
        async for memory in _memories(application, tenant)
    ]
    report.memories_deleted += sum(purged)
    left = await catalog.memories_in_state(MemoryState.DELETING, tenant.uid)
    try:
        await application.deletions.purge_tenant(tenant.uid)
    except DeletionUnfinishedError as error:
        log.error("%s", error)
        return
    await catalog.delete_tenant(tenant.uid)
    report.memories_deleted += len(left)
    report.tenants_deleted += 1


async def _purge(application: Application, memory: MemoryRow) -> bool:
    """False when something of it is left: it stays marked, and nobody sees it."""
    try:
        await application.deletions.purge_memory(memory)
    except DeletionUnfinishedError as error:
        log.error("%s", error)
        return False
    return True


async def iterate_tenants(application: Application) -> AsyncIterator[TenantRow]:
    """Every tenant but those that go: what could not be removed of one keeps nobody from being
    served.
    """
    after = None
    while True:
        rows, after = await application.catalog.list_tenants(_PAGE, after)
        for row in rows:
            if row.deleting_us is None:
                yield row
        if after is None:
            return


async def _memories(application: Application, tenant: TenantRow) -> AsyncIterator[MemoryRow]:
    after = None
    while True:
        rows, after = await application.catalog.list_memories(tenant.uid, _PAGE, after)
        for row in rows:
            yield row
        if after is None:
            return


async def _reconcile_tenant(application: Application, tenant: TenantRow, report: Report) -> None:
    # Where nothing was ever written, opening the store would make it.
    written = application.data.tenant(tenant.uid).exists()
    known: set[MemoryUid] = set()
    async for memory in _memories(application, tenant):
        known.add(memory_uid(memory))
        if written:
            await _reconcile_memory(application, memory, report)
    if written:
        report.orphan_memories += await application.stores.run(tenant.uid, _drop_unknown, known)
    report.orphan_keys += await asyncio.to_thread(_drop_keys, application, tenant, known)


def _drop_keys(application: Application, tenant: TenantRow, known: set[MemoryUid]) -> int:
    """Keys of memories that a crash kept from being made, or that are gone."""
    if not application.data.keys(tenant.uid).exists():
        return 0
    keys = application.keys.tenant(tenant.uid)
    if keys is None:
        return 0
    unknown = [uid for uid in keys.memories() if uid not in known]
    for uid in unknown:
        keys.destroy(uid)
    return len(unknown)


def _drop_unknown(store: TenantStore, known: set[MemoryUid]) -> int:
    unknown = [memory for memory in store.memories() if memory not in known]
    for memory in unknown:
        store.delete_memory(memory)
    return len(unknown)


async def _reconcile_memory(application: Application, memory: MemoryRow, report: Report) -> None:
    catalog = application.catalog
    encodings = await catalog.list_encodings(memory.uid)
    removed = await catalog.removed_numbers(memory.uid)
    live = await catalog.live_numbers(memory.uid, 1, memory.last_number)
    expected = _Expected(
        memory_uid(memory),
        memory.last_number,
        frozenset(live),
        frozenset(removed),
        frozenset(_encoding_id(encoding) for encoding in encodings),
    )
    held = await application.stores.run(memory.tenant_uid, _clean, expected)
    reach(Failpoint.RECONCILE_CLEANED)
    report.orphan_documents += held.orphans
    report.foreign_encodings += held.foreign
    if removed:
        await catalog.forget_removed(memory.uid, removed)
        report.removed_documents += len(removed)
        reach(Failpoint.RECONCILE_FORGOTTEN)
    lost = sorted(expected.live - held.documents)
    if lost:
        log.error("memory %s has lost the text of %d documents", memory.uid, len(lost))
        report.lost_documents[memory.uid] = lost
    for encoding in encodings:
        blocks = held.blocks.get(_encoding_id(encoding), frozenset())
        report.rewound_encodings += await _rewind(application, encoding, live, blocks)


def _clean(store: TenantStore, expected: _Expected) -> _Held:
    """Makes the store agree with the catalog, in its writer thread."""
    memory = expected.memory
    stored = frozenset(store.document_numbers(memory))
    orphans = stored - expected.live - expected.removed
    blocks = {e: frozenset(store.block_numbers(memory, e)) for e in store.encodings(memory)}
    foreign = blocks.keys() - expected.encodings
    for encoding in foreign:
        store.delete_encoding(memory, encoding)
    kept = {encoding: numbers for encoding, numbers in blocks.items() if encoding not in foreign}
    dead = (stored | frozenset().union(*kept.values())) - expected.live
    if dead:
        store.delete_documents(memory, sorted(dead))
    return _Held(
        stored & expected.live,
        {encoding: numbers & expected.live for encoding, numbers in kept.items()},
        orphans=len(orphans),
        foreign=len(foreign),
    )


async def _rewind(
    application: Application, encoding: EncodingRow, live: list[int], blocks: frozenset[int]
) -> bool:
    """Puts the watermark below the first live document at or below it without a block."""
    catalog = application.catalog
    aside = await catalog.quarantined(encoding.memory_uid, encoding.model_id)
    encoded = (number for number in live if number <= encoding.encoded_number)
    gap = next((number for number in encoded if number not in blocks and number not in aside), None)
    if gap is None:
        return False
    await catalog.rewind_encoding(encoding.memory_uid, encoding.model_id, gap)
    reach(Failpoint.RECONCILE_REWOUND)
    return True


def _encoding_id(encoding: EncodingRow) -> EncodingId:
    return EncodingId(bytes.fromhex(encoding.identity)[:16])
