"""Verifies the audit trail: every entry of every tenant, deleted ones included."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from storage.catalog import AuditRow, BrokenChainError, Catalog, follow

_PAGE = 1000


@dataclass(frozen=True)
class Trail:
    """One tenant's chain. problem: empty when it is whole; entries and head are then its end."""

    tenant_uid: str
    entries: int
    head: str
    problem: str = ""


async def verify_trails(catalog: Catalog, key: bytes) -> AsyncIterator[Trail]:
    """key: of the chains' digests. Raises CatalogError."""
    for tenant_uid in await catalog.audited_tenants():
        last: AuditRow | None = None
        seen = 0
        try:
            while rows := await catalog.audit_chain(tenant_uid, seen, _PAGE):
                last = follow(key, last, rows)
                seen = rows[-1].sequence
        except BrokenChainError as error:
            yield Trail(tenant_uid, error.sequence, "", str(error))
            continue
        if last is not None:
            yield Trail(tenant_uid, last.sequence, last.digest.hex())


async def contains(catalog: Catalog, tenant_uid: str, sequence: int, digest: str) -> bool:
    """Whether a chain still holds the entry that was its head when somebody noted it."""
    rows = await catalog.audit_chain(tenant_uid, sequence - 1, 1)
    return bool(rows) and (rows[0].sequence, rows[0].digest.hex()) == (sequence, digest)
