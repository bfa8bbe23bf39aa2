"""Memories: names, states, versions, listing."""

from __future__ import annotations

import pytest

from storage.catalog import (
    AlreadyExistsError,
    Catalog,
    ConflictError,
    Cursor,
    MemoryRow,
    MemoryState,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
    TenantRow,
)
from tests.support.catalogs import PACKING, append, make_memory, model_row, request_record


class TestCreate:
    async def test_starts_empty(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant, labels={"b": "zwei", "a": "é"})
        assert await catalog.get_memory(tenant.uid, "memory") == memory
        assert await catalog.get_memory_by_uid(memory.uid) == memory
        assert memory.labels == {"a": "é", "b": "zwei"}
        assert memory.packing == PACKING
        assert (memory.revision, memory.last_number, memory.document_count) == (0, 0, 0)
        assert memory.created_us == memory.updated_us

    async def test_uid_and_time_can_be_given(self, catalog: Catalog, tenant: TenantRow) -> None:
        uid = "ab" * 16
        memory = await catalog.create_memory(
            tenant.uid, "m", "", {}, PACKING, MemoryState.ACTIVE, None, uid=uid, created_us=5
        )
        assert (memory.uid, memory.created_us) == (uid, 5)

    async def test_name_is_taken_within_a_tenant_only(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        other = await catalog.create_tenant("other", "")
        mine, theirs = await make_memory(catalog, tenant), await make_memory(catalog, other)
        assert mine.uid != theirs.uid
        with pytest.raises(AlreadyExistsError):
            await make_memory(catalog, tenant)
        assert await catalog.get_memory(tenant.uid, "memory") == mine

    async def test_unknown_tenant(self, catalog: Catalog, tenant: TenantRow) -> None:
        nobody = TenantRow("0" * 32, "nobody", "", 0)
        with pytest.raises(NotFoundError):
            await make_memory(catalog, nobody)

    async def test_a_repeated_request_finds_its_reply(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        request = request_record("r1", method="CreateMemory", payload="p", reply=b"first")
        await make_memory(catalog, tenant, request=request)
        with pytest.raises(RequestRepeatedError) as caught:
            await make_memory(catalog, tenant, request=request)
        assert caught.value.record == request
        assert await catalog.find_request(tenant.uid, "r1") == request

    @pytest.mark.parametrize(
        ("method", "payload"), [("CreateMemory", "other"), ("AppendTurns", "p")]
    )
    async def test_the_id_of_another_call_is_refused(
        self, catalog: Catalog, tenant: TenantRow, method: str, payload: str
    ) -> None:
        first = request_record("r1", method="CreateMemory", payload="p")
        await make_memory(catalog, tenant, request=first)
        second = request_record("r1", method=method, payload=payload)
        with pytest.raises(RequestIdReusedError):
            await make_memory(catalog, tenant, "another", request=second)
        with pytest.raises(NotFoundError):
            await catalog.get_memory(tenant.uid, "another")

    async def test_a_failed_creation_records_no_request(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await make_memory(catalog, tenant)
        with pytest.raises(AlreadyExistsError):
            await make_memory(catalog, tenant, request=request_record("r1"))
        assert await catalog.find_request(tenant.uid, "r1") is None

    async def test_request_ids_of_tenants_are_apart(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        other = await catalog.create_tenant("other", "")
        await make_memory(catalog, tenant, request=request_record("r1", payload="mine"))
        await make_memory(catalog, other, request=request_record("r1", payload="theirs"))

    async def test_waits_under_the_default_model(self, catalog: Catalog, tenant: TenantRow) -> None:
        await catalog.upsert_model(model_row("a"))
        await catalog.upsert_model(model_row("b", default=False))
        memory = await make_memory(catalog, tenant)
        (encoding,) = await catalog.list_encodings(memory.uid)
        assert encoding.model_id == memory.default_model_id == "a"
        assert encoding.complete


async def test_uids_of_names_are_of_the_living_of_one_tenant(
    catalog: Catalog, tenant: TenantRow
) -> None:
    other = await catalog.create_tenant("other", "")
    a, b = [await make_memory(catalog, tenant, name) for name in "ab"]
    await make_memory(catalog, other, "a")
    assert await catalog.memory_uids(tenant.uid, ["a", "b", "absent"]) == {a.uid, b.uid}
    await catalog.begin_delete_memory(tenant.uid, "a", None)
    assert await catalog.memory_uids(tenant.uid, ["a", "b"]) == {b.uid}
    assert await catalog.memory_uids(tenant.uid, []) == set()


async def test_what_is_shown_is_the_memory_with_its_encodings(
    catalog: Catalog, tenant: TenantRow
) -> None:
    await catalog.upsert_model(model_row("a"))
    other = await catalog.create_tenant("other", "")
    first, second, theirs = [
        await append(catalog, await make_memory(catalog, owner, name), [5])
        for owner, name in ((tenant, "first"), (tenant, "second"), (other, "first"))
    ]
    encodings = {m.uid: await catalog.list_encodings(m.uid) for m in (first, second, theirs)}
    assert all(len(one) == 1 for one in encodings.values())
    assert await catalog.show_memory(tenant.uid, "first") == (first, encodings[first.uid])
    assert await catalog.show_memory(other.uid, "first") == (theirs, encodings[theirs.uid])
    with pytest.raises(NotFoundError):
        await catalog.show_memory(tenant.uid, "first", only=[second.uid])
    rows, shown, more = await catalog.show_memories(tenant.uid, 1)
    assert (rows, shown) == ([second], {second.uid: encodings[second.uid]})
    rows, shown, more = await catalog.show_memories(tenant.uid, 1, more)
    assert (rows, shown, more) == ([first], {first.uid: encodings[first.uid]}, None)
    await catalog.begin_delete_memory(tenant.uid, "first", None)
    with pytest.raises(NotFoundError):
        await catalog.show_memory(tenant.uid, "first")


class TestChange:
    async def test_sets_only_what_is_given(self, catalog: Catalog, tenant: TenantRow) -> None:
        before = await make_memory(catalog, tenant, labels={"a": "1"})
        named = await catalog.update_memory(tenant.uid, "memory", "Name", None, None)
        assert (named.display_name, named.labels) == ("Name", {"a": "1"})
        assert named.version == before.version + 1
        assert named.updated_us > before.updated_us
        cleared = await catalog.update_memory(tenant.uid, "memory", None, {}, named.version)
        assert (cleared.display_name, cleared.labels) == ("Name", {})
        assert await catalog.get_memory(tenant.uid, "memory") == cleared

    async def test_stale_version(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant)
        moved = await append(catalog, memory)
        assert moved.version != memory.version
        with pytest.raises(ConflictError):
            await catalog.update_memory(tenant.uid, "memory", "x", None, memory.version)
        with pytest.raises(ConflictError):
            await catalog.begin_delete_memory(tenant.uid, "memory", memory.version)
        assert await catalog.get_memory(tenant.uid, "memory") == moved

    async def test_another_memory_of_the_name_is_not_touched(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        checked = await make_memory(catalog, tenant)
        await catalog.begin_delete_memory(tenant.uid, "memory", None, uid=checked.uid)
        later = await make_memory(catalog, tenant)
        with pytest.raises(NotFoundError):
            await catalog.update_memory(tenant.uid, "memory", "x", None, None, uid=checked.uid)
        with pytest.raises(NotFoundError):
            await catalog.begin_delete_memory(tenant.uid, "memory", None, uid=checked.uid)
        assert await catalog.get_memory(tenant.uid, "memory") == later

    async def test_a_deletion_for_one_state_leaves_another_alone(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        active = await make_memory(catalog, tenant)
        with pytest.raises(NotFoundError):
            await catalog.begin_delete_memory(
                tenant.uid, "memory", None, uid=active.uid, state=MemoryState.IMPORTING
            )
        assert await catalog.get_memory(tenant.uid, "memory") == active

    async def test_unknown(self, catalog: Catalog, tenant: TenantRow) -> None:
        with pytest.raises(NotFoundError):
            await catalog.update_memory(tenant.uid, "nope", "x", None, None)
        with pytest.raises(NotFoundError):
            await catalog.get_memory_by_uid("0" * 32)

    async def test_import_ends_once(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant, state=MemoryState.IMPORTING)
        assert await catalog.memories_in_state(MemoryState.IMPORTING) == [memory]
        request = request_record("import", method="ImportMemory")
        active = await catalog.activate_memory(memory.uid, request=request)
        assert active.state is MemoryState.ACTIVE
        assert await catalog.activate_memory(memory.uid) == active
        assert await catalog.find_request(tenant.uid, "import") == request
        assert await catalog.memories_in_state(MemoryState.IMPORTING) == []

    async def test_an_import_keeps_numbers_from_being_given_out_again(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant, state=MemoryState.IMPORTING)
        await append(catalog, memory, [1, 1])
        active = await catalog.activate_memory(memory.uid, last_number=9)
        assert active.last_number == 9
        assert (await append(catalog, active)).last_number == 10
        lower = await make_memory(catalog, tenant, "lower", state=MemoryState.IMPORTING)
        await append(catalog, lower, [1, 1])
        assert (await catalog.activate_memory(lower.uid, last_number=1)).last_number == 2

    async def test_a_deleted_import_stays_deleted(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant, state=MemoryState.IMPORTING)
        await catalog.begin_delete_memory(tenant.uid, "memory", None)
        with pytest.raises(NotFoundError):
            await catalog.activate_memory(memory.uid)


class TestDelete:
    async def test_is_gone_at_once_for_everyone_but_reconcile(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant))
        deleting = await catalog.begin_delete_memory(tenant.uid, "memory", memory.version)
        assert deleting.state is MemoryState.DELETING
        assert deleting.deletion_epoch == memory.deletion_epoch + 1
        with pytest.raises(NotFoundError):
            await catalog.get_memory(tenant.uid, "memory")
        with pytest.raises(NotFoundError):
            await catalog.begin_delete_memory(tenant.uid, "memory", None)
        with pytest.raises(NotFoundError):
            await append(catalog, deleting)
        with pytest.raises(NotFoundError):
            await catalog.commit_delete_documents(memory.uid, memory.revision, [1], None)
        assert await catalog.list_memories(tenant.uid, 10) == ([], None)
        assert await catalog.get_memory(tenant.uid, "memory", include_deleting=True) == deleting
        assert await catalog.memories_in_state(MemoryState.DELETING) == [deleting]
        assert (await catalog.usage(tenant.uid)).memories == 0

    async def test_the_name_is_free_again(self, catalog: Catalog, tenant: TenantRow) -> None:
        uids = set()
        for _ in range(3):
            uids.add((await make_memory(catalog, tenant)).uid)
            await catalog.begin_delete_memory(tenant.uid, "memory", None)
        alive = await make_memory(catalog, tenant)
        assert len(uids | {alive.uid}) == 4
        assert await catalog.get_memory(tenant.uid, "memory", include_deleting=True) == alive
        for uid in uids:
            await catalog.finish_delete_memory(uid)
        assert await catalog.get_memory(tenant.uid, "memory") == alive

    async def test_finishing_removes_every_row_and_repeats(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.upsert_model(model_row())
        memory = await append(catalog, await make_memory(catalog, tenant), [5, 6])
        await catalog.commit_encoded(memory.uid, "fake", "identity-1", 1, 0, 0, 0, {1: "long"})
        await catalog.begin_delete_memory(tenant.uid, "memory", None)
        for _ in range(2):
            await catalog.finish_delete_memory(memory.uid)
        assert await catalog.live_numbers(memory.uid, 1, 9) == []
        assert await catalog.quarantined(memory.uid, "fake") == {}
        assert await catalog.list_encodings(memory.uid) == []
        with pytest.raises(NotFoundError):
            await catalog.get_memory_by_uid(memory.uid)

    async def test_a_living_memory_is_not_removed(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        with pytest.raises(ConflictError):
            await catalog.finish_delete_memory(memory.uid)
        assert await catalog.get_memory(tenant.uid, "memory") == memory


class TestList:
    async def test_pages_are_stable_while_memories_come_and_go(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        made = [await make_memory(catalog, tenant, f"m{number}") for number in range(6)]
        first, cursor = await catalog.list_memories(tenant.uid, 2)
        await make_memory(catalog, tenant, "late")
        await catalog.begin_delete_memory(tenant.uid, "m3", None)
        await catalog.begin_delete_memory(tenant.uid, "m4", None)
        rest, end = await catalog.list_memories(tenant.uid, 10, cursor)
        assert first == [made[5], made[4]]
        assert rest == [made[2], made[1], made[0]]
        assert end is None

    async def test_equal_times_are_told_apart_by_uid(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        for number in range(5):
            await catalog.create_memory(
                tenant.uid, f"m{number}", "", {}, PACKING, MemoryState.ACTIVE, None, created_us=7
            )
        seen: list[MemoryRow] = []
        cursor: Cursor | None = None
        for _ in range(5):
            page, cursor = await catalog.list_memories(tenant.uid, 1, cursor)
            seen += page
        assert cursor is None
        assert {row.memory_id for row in seen} == {f"m{number}" for number in range(5)}
        assert [row.uid for row in seen] == sorted((row.uid for row in seen), reverse=True)

    async def test_other_tenants_are_not_listed(self, catalog: Catalog, tenant: TenantRow) -> None:
        other = await catalog.create_tenant("other", "")
        await make_memory(catalog, other)
        assert await catalog.list_memories(tenant.uid, 10) == ([], None)
