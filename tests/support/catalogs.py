"""Building blocks of catalog tests: rows to write, a clock that ticks, open catalogs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from storage.catalog import (
    ApiKeyRow,
    Catalog,
    DocumentRow,
    MemoryRow,
    MemoryState,
    ModelRow,
    Packing,
    PackingMode,
    RequestRecord,
    Scope,
    TenantRow,
)
from storage.catalog.schema import alembic_config, run_locked
from storage.layout import KVLayout

PACKING = Packing(PackingMode.WINDOW, 4, 8192)
LAYOUT = KVLayout((1, 3), 2, 8, 4, "bf16", separate_routing_keys=True)
START_US = 1_700_000_000_000_000


class TickingClock:
    """Every reading is one microsecond later than the one before."""

    def __init__(self, start_us: int = START_US) -> None:
        self._ticks = itertools.count(start_us)

    def __call__(self) -> int:
        return next(self._ticks)


@asynccontextmanager
async def open_catalog(url: str) -> AsyncIterator[Catalog]:
    """A catalog with a ticking clock, closed at the end."""
    catalog = await Catalog.open(url, clock_us=TickingClock())
    try:
        yield catalog
    finally:
        await catalog.close()


def request_record(
    request_id: str, *, method: str = "AppendTurns", payload: str = "", reply: bytes = b"reply"
) -> RequestRecord:
    """A request record whose fingerprint is that of `payload`."""
    return RequestRecord(request_id, method, hashlib.sha256(payload.encode()).digest(), reply)


def model_row(
    model_id: str = "fake", *, identity: str = "identity-1", default: bool = True, seen_us: int = 1
) -> ModelRow:
    """A model of the small layout."""
    return ModelRow(model_id, model_id.title(), identity, LAYOUT, 2048, 512, 256, default, seen_us)


def new_documents(memory: MemoryRow, sizes: Sequence[int]) -> list[DocumentRow]:
    """Documents of these text bytes that an append to `memory` would add now."""
    return [
        DocumentRow(
            memory.last_number + step, memory.revision + 1, START_US + memory.revision, size
        )
        for step, size in enumerate(sizes, start=1)
    ]


async def make_key(
    catalog: Catalog, tenant: TenantRow, key_id: str, scope: Scope = Scope.READ
) -> ApiKeyRow:
    """A key without an end, for all of the tenant's memories."""
    return await catalog.create_api_key(key_id, tenant.uid, "", scope, False, b"d" * 32, None)


def upgrade(url: str, revision: str) -> None:
    """Brings a database to a revision, the newest or an earlier one; blocks."""
    _move(url, command.upgrade, revision)


def downgrade(url: str, revision: str) -> None:
    """Takes a database back to an earlier revision; blocks."""
    _move(url, command.downgrade, revision)


def _move(url: str, move: Callable[[Config, str], None], revision: str) -> None:
    def work(connection: Connection) -> None:
        config = alembic_config()
        config.attributes["connection"] = connection
        move(config, revision)

    run_locked(url, work)


async def make_memory(
    catalog: Catalog,
    tenant: TenantRow,
    memory_id: str = "memory",
    *,
    state: MemoryState = MemoryState.ACTIVE,
    labels: Mapping[str, str] | None = None,
    request: RequestRecord | None = None,
    most: int = 0,
) -> MemoryRow:
    """A memory of the tenant, with the test packing."""
    return await catalog.create_memory(
        tenant.uid, memory_id, "", labels or {}, PACKING, state, request, most=most
    )


async def append(
    catalog: Catalog,
    memory: MemoryRow,
    sizes: Sequence[int] = (10,),
    request: RequestRecord | None = None,
) -> MemoryRow:
    """Appends documents of these text bytes."""
    return await catalog.commit_append(
        memory.uid, memory.revision, new_documents(memory, sizes), request
    )
