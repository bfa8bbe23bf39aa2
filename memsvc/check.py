"""Verifies a data folder: every record of every tenant, and the catalog against them.

Reads only, so it may run beside a server. The catalog is read first and the
store after it: as writes go to the store first, all that the catalog promises
must then be there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import StrEnum

from memsvc.audit import audit_key
from memsvc.audit_check import verify_trails
from memsvc.auth import load_server_key
from memsvc.config import Config
from memsvc.keys import load_root_keys
from storage.catalog import Catalog, EncodingRow, MemoryRow, MemoryState, NotFoundError, TenantRow
from storage.check import check_structure
from storage.crypto import RootKeys, open_keys
from storage.keys import UID_BYTES
from storage.lmdb_store import LmdbReader
from storage.paths import DataFolder
from storage.store import EncodingId, MemoryUid, Problem, StoreNotFoundError


class Severity(StrEnum):
    """damage: something is lost or wrong. leftover: `memsvc serve` tidies it when it starts."""

    DAMAGE = "damage"
    LEFTOVER = "leftover"


@dataclass(frozen=True)
class CheckFinding:
    """One thing that is not as it should be. memory: uid, empty when none is to blame."""

    severity: Severity
    tenant: str
    memory: str
    problem: str
    detail: str


@dataclass(frozen=True)
class _Expected:
    """What the catalog says of one memory."""

    memory: MemoryRow
    live: frozenset[int]
    removed: frozenset[int]
    encodings: tuple[EncodingRow, ...]
    quarantined: dict[str, frozenset[int]]


async def check_data(config: Config) -> AsyncIterator[CheckFinding]:
    """Everything found wrong. Raises CatalogError, RootKeyError, ServerKeyError, StorageError
    when it cannot look.
    """
    root = load_root_keys(config)
    key = audit_key(load_server_key(config.folder.server_key))
    catalog = await Catalog.open(config.catalog_url)
    try:
        async for trail in verify_trails(catalog, key):
            if trail.problem:
                yield CheckFinding(
                    Severity.DAMAGE, trail.tenant_uid, "", "audit-altered", trail.problem
                )
        for tenant in await _tenants(catalog):
            expected = [
                await _expected(catalog, memory) for memory in await _memories(catalog, tenant)
            ]
            path = config.folder.tenant(tenant.uid)
            # LMDB trusts its pages: what is damaged there is not given to it.
            if structure := await asyncio.to_thread(check_structure, path):
                for found in structure:
                    yield CheckFinding(
                        Severity.DAMAGE, tenant.tenant_id, "", str(found.problem), found.detail
                    )
                continue
            try:
                store = await asyncio.to_thread(_open, config.folder, tenant.uid, root)
            except StoreNotFoundError:
                for one in expected:
                    if one.live:
                        yield _lost(tenant, one, one.live)
                continue
            try:
                for finding in await asyncio.to_thread(_check_store, store, tenant, expected):
                    if not await _outdated(catalog, finding):
                        yield finding
            finally:
                store.close()
    finally:
        await catalog.close()


def _open(folder: DataFolder, tenant: str, root: RootKeys | None) -> LmdbReader:
    """Raises StoreNotFoundError when nothing was ever written."""
    keys = None if root is None else open_keys(folder.keys(tenant), tenant, root)
    return LmdbReader(folder.tenant(tenant), keys)


async def _tenants(catalog: Catalog) -> list[TenantRow]:
    rows, after = await catalog.list_tenants(1000)
    while after is not None:
        more, after = await catalog.list_tenants(1000, after)
        rows += more
    return rows


async def _memories(catalog: Catalog, tenant: TenantRow) -> list[MemoryRow]:
    rows, after = await catalog.list_memories(tenant.uid, 1000)
    while after is not None:
        more, after = await catalog.list_memories(tenant.uid, 1000, after)
        rows += more
    leaving = await catalog.memories_in_state(MemoryState.DELETING)
    return rows + [memory for memory in leaving if memory.tenant_uid == tenant.uid]


async def _expected(catalog: Catalog, memory: MemoryRow) -> _Expected:
    encodings = tuple(await catalog.list_encodings(memory.uid))
    return _Expected(
        memory,
        frozenset(await catalog.live_numbers(memory.uid, 1, memory.last_number)),
        frozenset(await catalog.removed_numbers(memory.uid)),
        encodings,
        {
            e.model_id: frozenset(await catalog.quarantined(memory.uid, e.model_id))
            for e in encodings
        },
    )


async def _outdated(catalog: Catalog, finding: CheckFinding) -> bool:
    """Whether the memory was deleted, or is being so, since the catalog was read."""
    if finding.severity is Severity.LEFTOVER or not finding.memory:
        return False
    try:
        memory = await catalog.get_memory_by_uid(finding.memory)
    except NotFoundError:
        return True
    return memory.state is MemoryState.DELETING


def _check_store(
    store: LmdbReader, tenant: TenantRow, expected: list[_Expected]
) -> list[CheckFinding]:
    findings = []
    for f in store.check():
        # Of a memory as a whole: its key is missing while it is being deleted, too.
        whole = f.problem is Problem.NO_KEY and len(f.key) == 2 * UID_BYTES
        memory = f.key if whole else ""
        told = f"{f.key} {f.detail}"
        findings.append(
            CheckFinding(Severity.DAMAGE, tenant.tenant_id, memory, str(f.problem), told)
        )
    known = {MemoryUid(bytes.fromhex(one.memory.uid)) for one in expected}
    for one in expected:
        findings += _check_memory(store, tenant, one)
    for uid in store.memories():
        if uid not in known:
            findings.append(_leftover(tenant, uid.hex(), "a memory that the catalog does not have"))
    return findings


def _check_memory(store: LmdbReader, tenant: TenantRow, one: _Expected) -> Iterator[CheckFinding]:
    uid = MemoryUid(bytes.fromhex(one.memory.uid))
    stored = set(store.document_numbers(uid))
    if one.memory.state is MemoryState.DELETING:
        if stored:
            yield _leftover(tenant, one.memory.uid, f"{len(stored)} documents of a deleted memory")
        return
    if missing := one.live - stored:
        yield _lost(tenant, one, frozenset(missing))
    if extra := stored - one.live:
        kind = "deleted" if extra <= one.removed else "unacknowledged"
        yield _leftover(tenant, one.memory.uid, f"{len(extra)} {kind} documents: {_some(extra)}")
    for encoding in one.encodings:
        promised = {n for n in one.live if n <= encoding.encoded_number}
        blocks = set(store.block_numbers(uid, EncodingId(bytes.fromhex(encoding.identity)[:16])))
        if unkept := promised - blocks - one.quarantined[encoding.model_id]:
            yield CheckFinding(
                Severity.DAMAGE,
                tenant.tenant_id,
                one.memory.uid,
                "block-missing",
                f"{len(unkept)} blocks of {encoding.model_id}: {_some(unkept)}",
            )


def _lost(tenant: TenantRow, one: _Expected, numbers: frozenset[int]) -> CheckFinding:
    detail = f"{len(numbers)} documents: {_some(numbers)}"
    return CheckFinding(
        Severity.DAMAGE, tenant.tenant_id, one.memory.uid, "document-missing", detail
    )


def _leftover(tenant: TenantRow, memory: str, detail: str) -> CheckFinding:
    return CheckFinding(Severity.LEFTOVER, tenant.tenant_id, memory, "leftover", detail)


def _some(numbers: set[int] | frozenset[int]) -> str:
    first = sorted(numbers)[:8]
    return ", ".join(map(str, first)) + (", ..." if len(numbers) > len(first) else "")
