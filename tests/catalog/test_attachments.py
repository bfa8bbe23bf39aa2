"""Which models a memory has, who answers, and when another one takes over."""

from __future__ import annotations

import asyncio

import pytest
from alembic import command
from sqlalchemy import Connection

from storage.catalog import (
    Catalog,
    ConflictError,
    EncodingRow,
    MemoryRow,
    ModelNotFoundError,
    NotFoundError,
    TenantRow,
    migrate,
)
from storage.catalog.schema import alembic_config, run_locked
from tests.support.catalogs import append, make_memory, model_row, open_catalog


@pytest.fixture
async def memory(catalog: Catalog, tenant: TenantRow) -> MemoryRow:
    """Five documents, encoded under "old", the server's default; "new" is known."""
    await catalog.upsert_model(model_row("old"))
    await catalog.upsert_model(model_row("new", default=False))
    made = await append(catalog, await make_memory(catalog, tenant), [10] * 5)
    await encode(catalog, made, "old", 5)
    return await catalog.get_memory_by_uid(made.uid)


async def encode(
    catalog: Catalog, memory: MemoryRow, model: str, up_to: int, above: int = 0
) -> EncodingRow:
    count = up_to - above
    return await catalog.commit_encoded(
        memory.uid, model, "identity-1", up_to, count, count, count, {}
    )


async def models_of(catalog: Catalog, memory: MemoryRow) -> tuple[str, str]:
    """Who answers, and who is due."""
    row = await catalog.get_memory_by_uid(memory.uid)
    return row.default_model_id, row.next_model_id


async def waiting(catalog: Catalog, model: str, *, behind: bool) -> list[str]:
    found = await catalog.backlog(model, 10, behind=behind)
    return [memory.memory_id for _, memory, _ in found]


class TestAttach:
    async def test_makes_all_wait_behind_the_one_that_answers(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        assert await models_of(catalog, memory) == ("old", "")
        assert await catalog.get_encoding(memory.uid, "new") is None
        row = await catalog.attach_model(memory.uid, "new")
        assert (row.default_model_id, row.next_model_id, row.own_model) == ("old", "", False)
        encoding = await catalog.get_encoding(memory.uid, "new")
        assert encoding is not None
        assert (encoding.pending_documents, encoding.complete) == (5, False)
        assert await waiting(catalog, "new", behind=True) == ["memory"]
        assert await waiting(catalog, "new", behind=False) == []
        assert await catalog.pending_by_tenant("new") == {}, "no write is refused for it"

    async def test_twice_keeps_what_is_encoded(self, catalog: Catalog, memory: MemoryRow) -> None:
        await catalog.attach_model(memory.uid, "new")
        await encode(catalog, memory, "new", 3)
        before = await catalog.get_encoding(memory.uid, "new")
        await catalog.attach_model(memory.uid, "new")
        assert await catalog.get_encoding(memory.uid, "new") == before

    async def test_switches_in_the_commit_that_completes_it(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        row = await catalog.attach_model(memory.uid, "new", make_default=True)
        assert (row.default_model_id, row.next_model_id, row.own_model) == ("old", "new", True)
        assert row.version > memory.version
        assert not (await encode(catalog, memory, "new", 4)).complete
        assert await models_of(catalog, memory) == ("old", "new")
        assert (await encode(catalog, memory, "new", 5, above=4)).complete
        assert await models_of(catalog, memory) == ("new", "")

    async def test_without_make_default_nothing_switches(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.attach_model(memory.uid, "new")
        assert (await encode(catalog, memory, "new", 5)).complete
        assert await models_of(catalog, memory) == ("old", "")
        await catalog.attach_model(memory.uid, "new", make_default=True)
        assert await models_of(catalog, memory) == ("new", ""), "complete already: at once"

    async def test_new_documents_do_not_take_completeness_back(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.attach_model(memory.uid, "new", make_default=True)
        await encode(catalog, memory, "new", 5)
        await append(catalog, await catalog.get_memory_by_uid(memory.uid))
        encoding = await catalog.get_encoding(memory.uid, "new")
        assert encoding is not None and encoding.complete and encoding.pending_documents == 1
        assert await waiting(catalog, "new", behind=False) == ["memory"]
        assert await waiting(catalog, "old", behind=False) == ["memory"], "complete once, always"

    async def test_being_as_far_as_the_one_that_answers_is_enough(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        """Under a steady stream of appends there is always something that waits."""
        await catalog.attach_model(memory.uid, "new", make_default=True)
        later = await append(catalog, await catalog.get_memory_by_uid(memory.uid), [1, 1])
        await encode(catalog, memory, "new", 4)
        assert await models_of(catalog, later) == ("old", "new")
        row = await encode(catalog, memory, "new", 5, above=4)
        assert row.complete and row.pending_documents == 2
        assert await models_of(catalog, later) == ("new", "")

    async def test_deleting_what_waits_completes_it(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.attach_model(memory.uid, "new", make_default=True)
        await encode(catalog, memory, "new", 3)
        await catalog.commit_delete_documents(memory.uid, memory.revision, [4, 5], None)
        assert await models_of(catalog, memory) == ("new", "")

    async def test_an_empty_memory_switches_at_once(
        self, catalog: Catalog, tenant: TenantRow, memory: MemoryRow
    ) -> None:
        empty = await make_memory(catalog, tenant, "empty")
        row = await catalog.attach_model(empty.uid, "new", make_default=True)
        assert (row.default_model_id, row.next_model_id) == ("new", "")

    async def test_the_first_choice_can_be_taken_back(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.attach_model(memory.uid, "new", make_default=True)
        await catalog.attach_model(memory.uid, "old", make_default=True)
        await encode(catalog, memory, "new", 5)
        assert await models_of(catalog, memory) == ("old", "")

    async def test_what_is_not_there(self, catalog: Catalog, memory: MemoryRow) -> None:
        with pytest.raises(ModelNotFoundError):
            await catalog.attach_model(memory.uid, "none")
        with pytest.raises(NotFoundError) as caught:
            await catalog.attach_model("0" * 32, "new")
        assert not isinstance(caught.value, ModelNotFoundError)


class TestDetach:
    async def test_forgets_the_encoding(self, catalog: Catalog, memory: MemoryRow) -> None:
        await catalog.attach_model(memory.uid, "new", make_default=True)
        await catalog.commit_encoded(memory.uid, "new", "identity-1", 2, 1, 1, 1, {2: "x"})
        row = await catalog.detach_model(memory.uid, "new")
        assert (row.default_model_id, row.next_model_id) == ("old", "")
        assert await catalog.get_encoding(memory.uid, "new") is None
        assert await catalog.quarantined(memory.uid, "new") == {}
        assert await catalog.detach_model(memory.uid, "new") == row, "twice is no error"
        with pytest.raises(NotFoundError):
            await encode(catalog, memory, "new", 5, above=2)

    async def test_the_one_that_answers_stays(self, catalog: Catalog, memory: MemoryRow) -> None:
        with pytest.raises(ConflictError):
            await catalog.detach_model(memory.uid, "old")
        await catalog.attach_model(memory.uid, "new", make_default=True)
        await encode(catalog, memory, "new", 5)
        await catalog.detach_model(memory.uid, "old")
        assert [e.model_id for e in await catalog.list_encodings(memory.uid)] == ["new"]


class TestDefaults:
    async def test_a_new_default_of_the_server_is_followed(
        self, catalog: Catalog, tenant: TenantRow, memory: MemoryRow
    ) -> None:
        own = await append(catalog, await make_memory(catalog, tenant, "own"))
        await catalog.attach_model(own.uid, "old", make_default=True)
        empty = await make_memory(catalog, tenant, "empty")
        await catalog.upsert_model(model_row("new"))
        assert await models_of(catalog, memory) == ("old", "new")
        assert await models_of(catalog, empty) == ("new", "")
        assert await models_of(catalog, own) == ("old", "")
        assert await catalog.get_encoding(own.uid, "new") is None
        await encode(catalog, memory, "new", 5)
        assert await models_of(catalog, memory) == ("new", "")

    async def test_a_worker_that_comes_again_changes_nothing(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        before = await catalog.get_memory_by_uid(memory.uid)
        await catalog.upsert_model(model_row("old", seen_us=7))
        assert await catalog.get_memory_by_uid(memory.uid) == before

    async def test_the_first_model_ever_answers_at_once(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        early = await append(catalog, await make_memory(catalog, tenant), [1, 1])
        assert await models_of(catalog, early) == ("", "")
        await catalog.upsert_model(model_row("old"))
        assert await models_of(catalog, early) == ("old", "")
        assert await waiting(catalog, "old", behind=False) == ["memory"]
        assert not (await encode(catalog, early, "old", 1)).complete
        assert (await encode(catalog, early, "old", 2, above=1)).complete

    async def test_a_tenants_default(
        self, catalog: Catalog, tenant: TenantRow, memory: MemoryRow
    ) -> None:
        other = await catalog.create_tenant("other", "")
        theirs = await make_memory(catalog, other)
        row = await catalog.update_tenant("acme", default_model_id="new")
        assert row.default_model_id == "new" and row.display_name == "Acme"
        assert await catalog.get_tenant("acme") == row
        assert await models_of(catalog, memory) == ("old", "new")
        assert await models_of(catalog, theirs) == ("old", "")
        later = await make_memory(catalog, tenant, "later")
        assert await models_of(catalog, later) == ("new", "")
        found = await catalog.default_model_of(tenant.uid)
        assert found is not None and found.model_id == "new"
        # The server's default is nothing to this tenant now.
        await catalog.upsert_model(model_row("third"))
        assert await models_of(catalog, memory) == ("old", "new")
        assert await models_of(catalog, theirs) == ("third", "")
        await catalog.update_tenant("acme", default_model_id="")
        assert await models_of(catalog, memory) == ("old", "third")

    async def test_of_a_tenant_what_is_not_there(
        self, catalog: Catalog, tenant: TenantRow, memory: MemoryRow
    ) -> None:
        with pytest.raises(ModelNotFoundError):
            await catalog.update_tenant("acme", default_model_id="none", display_name="Changed")
        assert await catalog.get_tenant("acme") == tenant
        with pytest.raises(NotFoundError):
            await catalog.update_tenant("nobody", display_name="x")
        named = await catalog.update_tenant("acme", display_name="Named")
        assert named.display_name == "Named"

    async def test_new_weights_start_over_where_the_model_is_attached(
        self, catalog: Catalog, tenant: TenantRow, memory: MemoryRow
    ) -> None:
        elsewhere = await make_memory(catalog, tenant, "elsewhere")
        await catalog.attach_model(memory.uid, "new")
        await encode(catalog, memory, "new", 5)
        await catalog.upsert_model(model_row("new", identity="identity-2", default=False))
        row = await catalog.get_encoding(memory.uid, "new")
        assert row is not None
        assert (row.identity, row.pending_documents, row.complete) == ("identity-2", 5, False)
        assert await catalog.get_encoding(elsewhere.uid, "new") is None


class TestMigration:
    async def test_what_was_encoded_stays_attached(self, catalog_url: str) -> None:
        async with open_catalog(catalog_url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            await catalog.upsert_model(model_row("old"))
            await catalog.upsert_model(model_row("new", default=False))
            memory = await append(catalog, await make_memory(catalog, tenant), [1] * 4)
            await catalog.attach_model(memory.uid, "new")
            await encode(catalog, memory, "new", 2)

        def down(connection: Connection) -> None:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.downgrade(config, "0002")

        await asyncio.to_thread(run_locked, catalog_url, down)
        await asyncio.to_thread(migrate, catalog_url)
        async with open_catalog(catalog_url) as catalog:
            assert await models_of(catalog, memory) == ("old", "")
            old = await catalog.get_encoding(memory.uid, "old")
            new = await catalog.get_encoding(memory.uid, "new")
            assert old is not None and old.complete and old.pending_documents == 4
            assert new is not None and not new.complete and new.encoded_number == 2
