"""Revisions: one row per write, and what the memory held then."""

from __future__ import annotations

import asyncio

import pytest
from alembic import command
from sqlalchemy import Connection

from storage.catalog import (
    Catalog,
    ConflictError,
    MemoryRow,
    RequestRepeatedError,
    TenantRow,
    migrate,
)
from storage.catalog.schema import alembic_config, run_locked
from tests.support.catalogs import append, make_memory, open_catalog, request_record


@pytest.fixture
async def memory(catalog: Catalog, tenant: TenantRow) -> MemoryRow:
    """1: documents 1-3. 2: 4 and 5. 3: document 2 deleted. 4: 6."""
    first = await append(catalog, await make_memory(catalog, tenant), [1, 1, 1])
    second = await append(catalog, first, [1, 1])
    third = await catalog.commit_delete_documents(second.uid, second.revision, [2], None)
    return await append(catalog, third)


async def test_every_write_has_one(catalog: Catalog, memory: MemoryRow) -> None:
    rows, more = await catalog.list_revisions(memory.uid, 10)
    assert more is None
    assert [
        (row.revision, row.documents_added, row.documents_removed, row.last_number) for row in rows
    ] == [(4, 1, 0, 6), (3, 0, 1, 5), (2, 2, 0, 5), (1, 3, 0, 3)]
    times = [row.created_us for row in rows]
    assert times == sorted(times, reverse=True) and times[0] == memory.updated_us


async def test_pages(catalog: Catalog, memory: MemoryRow) -> None:
    found: list[int] = []
    before: int | None = None
    while True:
        rows, before = await catalog.list_revisions(memory.uid, 3, before)
        found += [row.revision for row in rows]
        if before is None:
            break
    assert found == [4, 3, 2, 1]


async def test_as_of(catalog: Catalog, memory: MemoryRow) -> None:
    for revision, last in ((0, 0), (1, 3), (2, 5), (3, 5), (4, 6), (9, 6)):
        row = await catalog.revision_at(memory.uid, revision=revision)
        assert row.last_number == last
        listed, _ = await catalog.list_documents(memory.uid, 10, last_number=last)
        assert [d.number for d in listed] == [n for n in range(1, last + 1) if n != 2]
    rows, _ = await catalog.list_revisions(memory.uid, 10)
    for row in rows:
        assert await catalog.revision_at(memory.uid, at_us=row.created_us) == row
        before = await catalog.revision_at(memory.uid, at_us=row.created_us - 1)
        assert before.revision == row.revision - 1
    assert (await catalog.revision_at("0" * 32, revision=5)).revision == 0


async def test_a_write_that_fails_leaves_none(catalog: Catalog, memory: MemoryRow) -> None:
    record = request_record("r1")
    again = await append(catalog, memory, request=record)
    with pytest.raises(ConflictError):
        await append(catalog, memory)
    with pytest.raises(RequestRepeatedError):
        await append(catalog, again, request=record)
    rows, _ = await catalog.list_revisions(memory.uid, 10)
    assert [row.revision for row in rows] == [5, 4, 3, 2, 1]


async def test_they_go_with_their_memory(
    catalog: Catalog, tenant: TenantRow, memory: MemoryRow
) -> None:
    await catalog.begin_delete_memory(tenant.uid, memory.memory_id, None)
    await catalog.finish_delete_memory(memory.uid)
    assert await catalog.list_revisions(memory.uid, 10) == ([], None)


async def test_the_migration_reads_them_from_what_is_left(catalog_url: str) -> None:
    async with open_catalog(catalog_url) as catalog:
        tenant = await catalog.create_tenant("acme", "")
        first = await append(catalog, await make_memory(catalog, tenant), [1, 1])
        memory = await append(catalog, first, [1])

    def down(connection: Connection) -> None:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")

    await asyncio.to_thread(run_locked, catalog_url, down)
    await asyncio.to_thread(migrate, catalog_url)
    async with open_catalog(catalog_url) as catalog:
        rows, _ = await catalog.list_revisions(memory.uid, 10)
        assert [(r.revision, r.documents_added, r.last_number) for r in rows] == [
            (2, 1, 3),
            (1, 2, 2),
        ]
        assert await append(catalog, memory)
