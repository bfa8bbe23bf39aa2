"""Writers at once: none lost, none doubled, and every loser is told what happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace

from sqlalchemy import insert

from storage.catalog import (
    AlreadyExistsError,
    Catalog,
    ConflictError,
    LimitReachedError,
    MemoryRow,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
    TenantRow,
)
from storage.catalog.attachments import keep_memories_out
from storage.catalog.tables import models
from tests.support.catalogs import (
    LAYOUT,
    append,
    make_memory,
    model_row,
    new_documents,
    open_catalog,
    request_record,
)

WRITERS = 8


async def outcomes(
    catalogs: Sequence[Catalog], call: Callable[[Catalog, int], Awaitable[MemoryRow]]
) -> tuple[list[MemoryRow], list[BaseException]]:
    """Runs one call per writer at once: what succeeded, what was raised."""
    results = await asyncio.gather(
        *(call(catalogs[number % len(catalogs)], number) for number in range(WRITERS)),
        return_exceptions=True,
    )
    rows = [result for result in results if isinstance(result, MemoryRow)]
    errors = [result for result in results if isinstance(result, BaseException)]
    return rows, errors


class TestConcurrentWriters:
    """Two catalogs on one database stand for two processes."""

    async def test_one_of_many_appends_to_one_revision_wins(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        async with open_catalog(catalog_url) as second:
            rows, errors = await outcomes(
                [catalog, second], lambda one, _number: append(one, memory, [1, 2])
            )
        assert len(rows) == 1
        assert {type(error) for error in errors} == {ConflictError}
        after = await catalog.get_memory(tenant.uid, "memory")
        assert (after.revision, after.document_count) == (1, 2)

    async def test_the_same_request_at_once_is_served_once(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memories = [
            await make_memory(catalog, tenant, f"memory{number}") for number in range(WRITERS)
        ]

        # Different memories: only the request's unique key stands between them.
        async def call(one: Catalog, number: int) -> MemoryRow:
            record = request_record("r1", payload="p", reply=str(number).encode())
            return await append(one, memories[number], request=record)

        async with open_catalog(catalog_url) as second:
            rows, errors = await outcomes([catalog, second], call)
        assert len(rows) == 1
        winner = await catalog.find_request(tenant.uid, "r1")
        assert winner is not None
        assert winner.reply == rows[0].memory_id.removeprefix("memory").encode()
        for error in errors:
            assert isinstance(error, RequestRepeatedError)
            assert error.record == winner
        assert (await catalog.usage(tenant.uid)).documents == 1

    async def test_the_same_id_for_other_payloads_at_once(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memories = [
            await make_memory(catalog, tenant, f"memory{number}") for number in range(WRITERS)
        ]
        async with open_catalog(catalog_url) as second:
            rows, errors = await outcomes(
                [catalog, second],
                lambda one, number: append(
                    one, memories[number], request=request_record("r1", payload=str(number))
                ),
            )
        assert len(rows) == 1
        assert {type(error) for error in errors} == {RequestIdReusedError}
        assert (await catalog.usage(tenant.uid)).documents == 1

    async def test_one_of_many_creations_of_a_name_wins(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        async with open_catalog(catalog_url) as second:
            rows, errors = await outcomes(
                [catalog, second], lambda one, _number: make_memory(one, tenant)
            )
        assert len(rows) == 1
        assert {type(error) for error in errors} == {AlreadyExistsError}

    async def test_no_more_memories_than_the_tenant_may_have(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.upsert_model(model_row())
        source = await append(catalog, await make_memory(catalog, tenant, "source"))
        await make_memory(catalog, await catalog.create_tenant("other", ""))

        async def add(one: Catalog, number: int) -> MemoryRow:
            name = f"memory{number}"
            if number % 4 == 0:
                await one.update_tenant(tenant.tenant_id, default_model_id="fake")
            if number % 2:
                child = replace(source, uid=f"{number:032x}", memory_id=name)
                return await one.commit_fork(source, child, None, lambda *_: None, most=4)
            return await make_memory(one, tenant, name, most=4)

        async with open_catalog(catalog_url) as second:
            rows, errors = await outcomes([catalog, second], add)
        assert len(rows) == 3
        assert {type(error) for error in errors} == {LimitReachedError}
        assert (await catalog.usage(tenant.uid)).memories == 4
        await catalog.begin_delete_memory(tenant.uid, "source", None)
        await make_memory(catalog, tenant, "again", most=4)

    async def test_a_tenant_marked_for_deletion_has_all_the_memories_it_will_ever_have(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        async def mark(one: Catalog) -> int:
            await one.begin_delete_tenant(tenant.uid)
            return (await one.usage(tenant.uid)).memories

        async with open_catalog(catalog_url) as second:
            marking = asyncio.create_task(mark(second))
            rows, errors = await outcomes(
                [catalog], lambda one, number: make_memory(one, tenant, f"memory{number}")
            )
            held = await marking
        assert held == len(rows) == (await catalog.usage(tenant.uid)).memories
        assert {type(error) for error in errors} <= {NotFoundError}

    async def test_appends_to_many_memories_all_land(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.upsert_model(model_row())

        async def write(one: Catalog, number: int) -> MemoryRow:
            memory = await make_memory(one, tenant, f"memory{number}")
            for step in range(5):
                memory = await append(one, memory, [1], request_record(f"{number}/{step}"))
            return memory

        async with open_catalog(catalog_url) as second:
            rows, errors = await outcomes([catalog, second], write)
        assert errors == []
        assert {(row.revision, row.document_count) for row in rows} == {(5, 5)}
        assert await catalog.pending_by_tenant("fake") == {tenant.uid: (5 * WRITERS, 5 * WRITERS)}

    async def test_encoding_and_writing_do_not_disturb_each_other(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.upsert_model(model_row())
        memory = await append(catalog, await make_memory(catalog, tenant), [1] * 10)

        async def write() -> None:
            current = memory
            for step in range(15):
                if step % 3 == 2:
                    current = await catalog.commit_delete_documents(
                        current.uid,
                        current.revision,
                        [current.last_number - 1, current.last_number],
                        None,
                    )
                else:
                    current = await append(catalog, current, [1] * 2)

        async def encode(other: Catalog) -> None:
            while True:
                numbers = await other.next_numbers(memory.uid, "fake", 3)
                if not numbers:
                    return
                await other.commit_encoded(
                    memory.uid, "fake", "identity-1", numbers[-1], len(numbers), 1, 1, {}
                )

        async with open_catalog(catalog_url) as second:
            await asyncio.gather(write(), encode(second))
            await encode(second)
        row = await catalog.get_encoding(memory.uid, "fake")
        live = await catalog.live_numbers(memory.uid, 1, 1000)
        assert row is not None
        assert (row.pending_documents, row.encoded_documents) == (0, len(live))

    async def test_a_model_and_memories_that_come_together_find_each_other(
        self, catalog_url: str, catalog: Catalog, tenant: TenantRow
    ) -> None:
        async with open_catalog(catalog_url) as second:
            *memories, _ = await asyncio.gather(
                *(make_memory(catalog, tenant, f"memory{number}") for number in range(WRITERS)),
                second.upsert_model(model_row()),
            )
        uids = [memory.uid for memory in memories if isinstance(memory, MemoryRow)]
        encodings = await catalog.list_encodings_for(uids)
        assert {len(rows) for rows in encodings.values()} == {1}
        assert len(uids) == WRITERS

    async def test_a_cancelled_write_leaves_the_catalog_usable(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        for delay_s in (0.0, 0.0005, 0.001, 0.002, 0.004):
            write = asyncio.create_task(
                catalog.commit_append(
                    memory.uid, memory.revision, new_documents(memory, [1] * 50), None
                )
            )
            await asyncio.sleep(delay_s)
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)
            # All of it happened or none of it.
            memory = await catalog.get_memory(tenant.uid, "memory")
            assert memory.document_count == 50 * memory.revision
            live = await catalog.live_numbers(memory.uid, 1, memory.last_number)
            assert len(live) == memory.document_count
        assert (await append(catalog, memory)).document_count == memory.document_count + 1


async def test_a_memory_made_while_the_first_model_comes_is_attached_to_it(
    catalog: Catalog, tenant: TenantRow
) -> None:
    if catalog._database.is_sqlite:
        return  # One writer: a memory is made before or after.
    async with catalog._database.writing() as connection:
        await keep_memories_out(catalog._database, connection)
        making = asyncio.create_task(make_memory(catalog, tenant))
        done, _ = await asyncio.wait({making}, timeout=0.3)
        assert not done
        model = {**asdict(model_row("first")), "layout": json.dumps(asdict(LAYOUT))}
        model["is_default"] = model.pop("default")
        await connection.execute(insert(models).values(model))
    (encoding,) = await catalog.list_encodings((await making).uid)
    assert encoding.model_id == "first"


async def test_a_new_default_and_new_memories_wait_for_each_other_in_one_order(
    catalog: Catalog, tenant: TenantRow
) -> None:
    for name in ("one", "two"):
        await catalog.upsert_model(model_row(name, default=name == "one"))

    async def change(number: int) -> None:
        await catalog.update_tenant(tenant.tenant_id, default_model_id=("one", "two")[number % 2])

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(make_memory(catalog, tenant, f"memory-{number}"))
            group.create_task(change(number))
