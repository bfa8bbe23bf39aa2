"""Damage in the store is mended from text: every record is verified, not only counted.

    damaged block, half of one, or one of another layout   removed; encoded again from its text
    damaged layout of an encoding                          the whole encoding, likewise
    damaged text                                           reported; its blocks are removed, and
                                                           the encoding queue sets it aside

It reads everything, so no start does it: `memsvc reconcile` does, on a folder that no
server holds. Watermarks are rewound before blocks are removed: a crash in between costs
a look at sound blocks, no more. What was deleted or undone halfway is
`memsvc.reconcile`'s, which runs first.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from memsvc.application import Application
from memsvc.reconcile import iterate_tenants
from storage.catalog import TenantRow
from storage.keys import LINEAGE_KINDS, Kind, RecordKey, parse_key
from storage.store import EncodingId, Finding, MemoryUid, Problem, StoreDamagedError, TenantStore

#: What removing the record, or half a block's other half, mends.
_MENDED = (Problem.DAMAGED, Problem.FOREIGN, Problem.HALF_BLOCK, Problem.NO_LAYOUT)

log = logging.getLogger(__name__)


@dataclass
class Mended:
    """What was done. damaged_texts: document numbers by memory uid, which nothing brings back.

    blocks: removed to be made again. unmended: findings that no rule here covers.
    damaged_stores: uids of tenants whose file is damaged as a whole: restore a backup.
    """

    blocks: int = 0
    damaged_texts: dict[str, list[int]] = field(default_factory=dict)
    damaged_stores: list[str] = field(default_factory=list)
    unmended: list[str] = field(default_factory=list)

    @property
    def lost(self) -> bool:
        """Whether something is damaged that text cannot mend."""
        return bool(self.damaged_texts or self.damaged_stores or self.unmended)


@dataclass
class _Removal:
    """What goes of one memory: single blocks by encoding, None for all of an encoding."""

    blocks: dict[EncodingId, set[int] | None] = field(default_factory=dict)
    texts: set[int] = field(default_factory=set)

    def add(self, key: RecordKey) -> None:
        """Takes in the record that something is wrong with."""
        if key.kind is Kind.DOCUMENT:
            self.texts.add(key.number)
        elif key.kind is Kind.ENCODING:
            self.blocks[key.encoding] = None
        else:
            numbers = self.blocks.setdefault(key.encoding, set())
            if numbers is not None:
                numbers.add(key.number)

    def numbers(self) -> list[int]:
        """Of the documents of which something goes."""
        blocks = (numbers for numbers in self.blocks.values() if numbers)
        return sorted(self.texts.union(*blocks))


async def mend(application: Application) -> Mended:
    """Verifies and mends every tenant's store. Call it after `reconcile`, before serving."""
    mended = Mended()
    async for tenant in iterate_tenants(application):
        try:
            await _mend_tenant(application, tenant, mended)
        except StoreDamagedError as error:
            log.error("%s", error)
            mended.damaged_stores.append(tenant.uid)
    return mended


async def _mend_tenant(application: Application, tenant: TenantRow, mended: Mended) -> None:
    if not application.data.tenant(tenant.uid).exists():
        return
    found = await application.stores.read(tenant.uid, lambda store: list(store.check()))
    for memory, removal in _by_memory(found, mended).items():
        await _mend_memory(application, tenant, memory, removal, mended)


def _by_memory(findings: list[Finding], mended: Mended) -> dict[MemoryUid, _Removal]:
    removals: dict[MemoryUid, _Removal] = {}
    for finding in findings:
        key = _record_of(finding)
        if key is None:
            mended.unmended.append(f"{finding.key}: {finding.problem}: {finding.detail}")
            continue
        removals.setdefault(key.memory, _Removal()).add(key)
    return removals


def _record_of(finding: Finding) -> RecordKey | None:
    """The document or block that a finding condemns; None where that would mend nothing."""
    if finding.problem not in _MENDED:
        return None
    key = parse_key(bytes.fromhex(finding.key))
    return None if key.kind is Kind.KEYS or key.kind in LINEAGE_KINDS else key


async def _mend_memory(
    application: Application,
    tenant: TenantRow,
    memory: MemoryUid,
    removal: _Removal,
    mended: Mended,
) -> None:
    if removal.texts:
        log.error("memory %s: the text of %s is damaged", memory.hex(), sorted(removal.texts))
        mended.damaged_texts[memory.hex()] = sorted(removal.texts)
    # Whoever shares a document misses its block as well; a layout is a memory's own.
    numbers = removal.numbers()
    sharing = await application.stores.read(tenant.uid, lambda s: s.sharing(memory, numbers))
    for one in {memory, *sharing}:
        async for model_id, encoding in _encodings(application, one):
            gone = removal.blocks.get(encoding, set())
            if gone is None and one == memory:
                await application.catalog.rewind_encoding(one.hex(), model_id, 1)
            elif below := (gone or set()) | removal.texts:
                await application.catalog.rewind_encoding(one.hex(), model_id, min(below))
    mended.blocks += await application.stores.run(tenant.uid, _remove, memory, removal)


async def _encodings(
    application: Application, memory: MemoryUid
) -> AsyncIterator[tuple[str, EncodingId]]:
    for row in await application.catalog.list_encodings(memory.hex()):
        yield row.model_id, EncodingId(bytes.fromhex(row.identity)[:16])


def _remove(store: TenantStore, memory: MemoryUid, removal: _Removal) -> int:
    """Removes blocks, in the store's writer thread. Returns how many."""
    removed = 0
    sharing = {memory, *store.sharing(memory, removal.numbers())}
    shared = (encoding for one in sharing for encoding in store.encodings(one))
    for encoding in {*shared, *removal.blocks}:
        gone = removal.blocks.get(encoding, set())
        if gone is None:
            removed += len(store.block_numbers(memory, encoding))
            store.delete_encoding(memory, encoding)
        elif numbers := gone | removal.texts:
            removed += len(numbers)
            store.delete_blocks(memory, encoding, sorted(numbers))
    return removed
