"""Queries on a memory of 100,000 documents go through indices, and read a page, not a memory."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from sqlalchemy import event

from storage.catalog import Catalog, MemoryRow
from tests.catalog.test_forks import fork
from tests.support.catalogs import append, make_memory, model_row

COUNT = 100_000


@pytest.fixture
async def memory(catalog: Catalog) -> AsyncIterator[MemoryRow]:
    tenant = await catalog.create_tenant("acme", "")
    await catalog.upsert_model(model_row())
    for other in range(50):
        await append(catalog, await make_memory(catalog, tenant, f"other{other}"), [1] * 20)
    memory = await append(catalog, await make_memory(catalog, tenant), [1] * COUNT)
    row = await catalog.commit_encoded(
        memory.uid, "fake", "identity-1", COUNT // 2, COUNT // 2, 1, 1, {}
    )
    assert row.pending_documents == COUNT // 2
    async with catalog._database.writing() as connection:
        await connection.exec_driver_sql("ANALYZE")
    yield memory


@contextmanager
def recorded(catalog: Catalog) -> Iterator[list[tuple[str, Any]]]:
    """SELECTs that run inside, with their parameters."""
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            seen.append((statement, parameters))

    engine = catalog._database.engine
    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


async def plan(catalog: Catalog, statement: str, parameters: Any) -> str:
    explain = "EXPLAIN QUERY PLAN " if catalog._database.is_sqlite else "EXPLAIN "
    async with catalog._database.reading() as connection:
        rows = (await connection.exec_driver_sql(explain + statement, parameters)).all()
    return "\n".join(str(row[-1]) for row in rows)


Call = Callable[[Catalog, MemoryRow], Awaitable[object]]
CALLS: dict[str, Call] = {
    "list_documents": lambda catalog, memory: catalog.list_documents(memory.uid, 50, COUNT // 2),
    "get_document": lambda catalog, memory: catalog.get_document(memory.uid, 77_777),
    "live_numbers": lambda catalog, memory: catalog.live_numbers(memory.uid, 500, 550),
    "removed_numbers": lambda catalog, memory: catalog.removed_numbers(memory.uid),
    "next_numbers": lambda catalog, memory: catalog.next_numbers(memory.uid, "fake", 32),
    "backlog": lambda catalog, memory: catalog.backlog("fake", 10),
    "pending_by_tenant": lambda catalog, memory: catalog.pending_by_tenant("fake"),
    "list_encodings": lambda catalog, memory: catalog.list_encodings(memory.uid),
    "list_memories": lambda catalog, memory: catalog.list_memories(memory.tenant_uid, 10),
    "show_memory": lambda catalog, memory: catalog.show_memory(memory.tenant_uid, memory.memory_id),
    "show_memories": lambda catalog, memory: catalog.show_memories(memory.tenant_uid, 10),
    "usage": lambda catalog, memory: catalog.usage(memory.tenant_uid),
}


async def test_no_query_scans_the_documents(catalog: Catalog, memory: MemoryRow) -> None:
    child, _ = await fork(catalog, memory)
    for one, (name, call) in product((memory, child), CALLS.items()):
        with recorded(catalog) as seen:
            await call(catalog, one)
        assert seen, name
        for statement, parameters in seen:
            text = await plan(catalog, statement, parameters)
            assert "SCAN documents" not in text, f"{name}:\n{text}"
            assert "Seq Scan on documents" not in text, f"{name}:\n{text}"


async def test_pages_and_batches_need_no_sorting(catalog: Catalog, memory: MemoryRow) -> None:
    child, _ = await fork(catalog, memory)
    names = ("list_documents", "next_numbers", "live_numbers", "removed_numbers")
    for one, name in product((memory, child), names):
        with recorded(catalog) as seen:
            await CALLS[name](catalog, one)
        for statement, parameters in seen:
            text = await plan(catalog, statement, parameters)
            assert "TEMP B-TREE" not in text, f"{name}:\n{text}"
            assert "Sort" not in text, f"{name}:\n{text}"


async def test_a_plan_that_scans_would_be_noticed(catalog: Catalog, memory: MemoryRow) -> None:
    text = await plan(catalog, "SELECT * FROM documents WHERE text_bytes = 3", ())
    assert "SCAN documents" in text or "Seq Scan on documents" in text


async def test_deleting_the_memory_takes_no_minutes(catalog: Catalog, memory: MemoryRow) -> None:
    await catalog.begin_delete_memory(memory.tenant_uid, "memory", None)
    started = time.perf_counter()
    await catalog.finish_delete_memory(memory.uid)
    # Without indices for the cascades this is quadratic. The machine may be busy.
    assert time.perf_counter() - started < 20
    assert await catalog.live_numbers(memory.uid, 1, COUNT) == []
