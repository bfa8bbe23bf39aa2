"""Forks in the catalog: documents of the parent's, encodings as far, the past behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from storage.catalog import (
    AlreadyExistsError,
    Catalog,
    ConflictError,
    EncodingRow,
    EncodingState,
    MemoryRow,
    MemoryState,
    NotFoundError,
    RequestIdReusedError,
    RequestRecord,
    RequestRepeatedError,
    TenantRow,
)
from storage.catalog.base import new_uid
from storage.catalog.tables import documents
from tests.support.catalogs import append, make_memory, model_row, request_record


class Made:
    """What was recorded of a fork."""

    missing = -1
    encodings: Sequence[EncodingRow] = ()


async def fork(
    catalog: Catalog,
    parent: MemoryRow,
    memory_id: str = "child",
    *,
    revision: int | None = None,
    request: RequestRecord | None = None,
) -> tuple[MemoryRow, Made]:
    """As of a revision, or of now."""
    then = parent if revision is None else await catalog.revision_at(parent.uid, revision=revision)
    child = replace(
        parent,
        uid=new_uid(),
        memory_id=memory_id,
        display_name="forked",
        labels={},
        revision=then.revision,
        last_number=then.last_number,
    )
    made = Made()

    def record(
        row: MemoryRow, encodings: Sequence[EncodingRow], missing: int
    ) -> RequestRecord | None:
        made.missing, made.encodings = missing, encodings
        return request

    return await catalog.commit_fork(parent, child, request, record), made


@pytest.fixture
async def parent(catalog: Catalog, tenant: TenantRow) -> MemoryRow:
    """1: documents 1-3. 2: 4 and 5. 3: document 2 deleted. 4: 6. Encoded up to 4, 3 set aside."""
    await catalog.upsert_model(model_row())
    row = await append(catalog, await make_memory(catalog, tenant), [10, 20, 30])
    row = await append(catalog, row, [40, 50])
    row = await catalog.commit_delete_documents(row.uid, row.revision, [2], None)
    await catalog.commit_encoded(row.uid, "fake", "identity-1", 4, 2, 50, 500, {3: "too long"})
    return await append(catalog, row, [60])


async def numbers(catalog: Catalog, memory: MemoryRow) -> list[int]:
    rows, _ = await catalog.list_documents(memory.uid, 100)
    return [row.number for row in rows]


async def test_a_fork_holds_what_its_parent_holds(catalog: Catalog, parent: MemoryRow) -> None:
    child, made = await fork(catalog, parent)
    assert await numbers(catalog, child) == [1, 3, 4, 5, 6]
    assert (child.revision, child.last_number, child.document_count) == (4, 6, 5)
    assert (child.text_bytes, child.version) == (parent.text_bytes, 1)
    assert (child.forked_from, child.forked_revision) == (parent.uid, 4)
    assert (parent.forked_from, parent.forked_revision) == ("", 0)
    assert made.missing == 0
    (own,) = await catalog.list_encodings(child.uid)
    (old,) = await catalog.list_encodings(parent.uid)
    assert made.encodings == [own] == [replace(old, memory_uid=child.uid)]
    assert await catalog.quarantined(child.uid, "fake") == {3: "too long"}
    assert await catalog.next_numbers(child.uid, "fake", 9) == [5, 6]
    documents = await catalog.get_documents(child.uid, [1, 6])
    assert documents == await catalog.get_documents(parent.uid, [1, 6])


async def test_each_goes_its_own_way(catalog: Catalog, parent: MemoryRow) -> None:
    child, _ = await fork(catalog, parent)
    child = await append(catalog, child, [70])
    child = await catalog.commit_delete_documents(child.uid, child.revision, [1, 3], None)
    parent = await append(catalog, parent, [80, 90])
    assert await numbers(catalog, child) == [4, 5, 6, 7]
    assert await numbers(catalog, parent) == [1, 3, 4, 5, 6, 7, 8]
    listed, _ = await catalog.list_revisions(child.uid, 10)
    assert [(r.revision, r.documents_added, r.documents_removed) for r in listed] == [
        (6, 0, 2),
        (5, 1, 0),
        (4, 5, 0),
    ]
    (own,) = await catalog.list_encodings(child.uid)
    assert (own.pending_documents, own.quarantined_documents, own.encoded_documents) == (3, 0, 1)


@pytest.mark.parametrize(
    ("revision", "expected", "waiting", "aside", "missing"),
    [
        (1, [1, 3], 0, 1, 1),
        (2, [1, 3, 4, 5], 1, 1, 1),
        (3, [1, 3, 4, 5], 1, 1, 0),
        (4, [1, 3, 4, 5, 6], 2, 1, 0),
    ],
)
async def test_a_fork_of_the_past(
    catalog: Catalog,
    parent: MemoryRow,
    *,
    revision: int,
    expected: list[int],
    waiting: int,
    aside: int,
    missing: int,
) -> None:
    child, made = await fork(catalog, parent, revision=revision)
    assert await numbers(catalog, child) == expected
    assert (child.revision, child.document_count) == (revision, len(expected))
    assert made.missing == missing
    (own,) = made.encodings
    assert (own.pending_documents, own.quarantined_documents) == (waiting, aside)
    assert own.encoded_documents == len(expected) - waiting - aside
    assert own.state is (EncodingState.ENCODING if waiting else EncodingState.READY)
    assert own.tokens == (50 if revision > 1 else 50 * 10 // 50)
    assert await catalog.documents_at(child.uid, revision) == len(expected)
    assert (await catalog.revision_at(child.uid, revision=revision)).last_number == max(expected)


async def test_a_fork_of_nothing(catalog: Catalog, tenant: TenantRow) -> None:
    empty = await make_memory(catalog, tenant)
    child, made = await fork(catalog, empty)
    assert (child.revision, child.document_count, made.missing) == (0, 0, 0)
    assert (await catalog.list_revisions(child.uid, 10))[0] == []
    assert await numbers(catalog, await append(catalog, child)) == [1]


async def test_the_parents_rows_can_go(catalog: Catalog, parent: MemoryRow) -> None:
    child, _ = await fork(catalog, parent)
    await catalog.begin_delete_memory(parent.tenant_uid, parent.memory_id, None)
    await catalog.finish_delete_memory(parent.uid)
    assert await numbers(catalog, child) == [1, 3, 4, 5, 6]
    again, _ = await fork(catalog, child, "grandchild", revision=4)
    assert again.forked_from == child.uid
    assert await numbers(catalog, again) == [1, 3, 4, 5, 6]
    usage = await catalog.usage(child.tenant_uid)
    assert (usage.memories, usage.documents) == (2, 10)


async def test_a_fork_writes_no_row_for_each_document(catalog: Catalog, tenant: TenantRow) -> None:
    large = await append(catalog, await make_memory(catalog, tenant), [1] * 2000)
    before = await rows_of(catalog)
    for number in range(3):
        await fork(catalog, large, f"now-{number}")
    assert await rows_of(catalog) == before
    large = await catalog.commit_delete_documents(large.uid, large.revision, [7], None)
    child, _ = await fork(catalog, large)
    # That the fork lacks it must outlive the parent's own row.
    assert await rows_of(catalog) == before + 1
    assert child.document_count == 1999


async def rows_of(catalog: Catalog) -> int:
    async def count() -> int:
        async with catalog._database.reading() as connection:
            found = await connection.execute(select(func.count()).select_from(documents))
            return int(found.scalar_one())

    return await catalog._database.run(count(), writes=False)


async def test_a_deleted_parent_is_found_by_nothing(catalog: Catalog, parent: MemoryRow) -> None:
    child, _ = await fork(catalog, parent)
    deleting = await catalog.begin_delete_memory(parent.tenant_uid, parent.memory_id, None)
    await catalog.finish_delete_memory(deleting.uid)
    await catalog.finish_delete_memory(deleting.uid)
    with pytest.raises(NotFoundError):
        await catalog.get_memory_by_uid(parent.uid)
    with pytest.raises(NotFoundError):
        await catalog.get_memory(parent.tenant_uid, parent.memory_id, include_deleting=True)
    assert await catalog.memories_in_state(MemoryState.DELETING) == []
    assert await catalog.list_encodings(parent.uid) == []
    with pytest.raises(ConflictError):
        await catalog.delete_tenant(parent.tenant_uid)
    await catalog.begin_delete_memory(child.tenant_uid, child.memory_id, None)
    await catalog.finish_delete_memory(child.uid)
    assert await rows_of(catalog) == 0
    await catalog.delete_tenant(parent.tenant_uid)


async def test_a_model_that_was_waited_for_can_take_over_in_the_fork(
    catalog: Catalog, parent: MemoryRow
) -> None:
    await catalog.upsert_model(model_row("second", identity="identity-2", default=False))
    await catalog.attach_model(parent.uid, "second", make_default=True)
    await catalog.commit_encoded(parent.uid, "second", "identity-2", 3, 2, 9, 90, {})
    parent = await catalog.get_memory_by_uid(parent.uid)
    assert (parent.default_model_id, parent.next_model_id) == ("fake", "second")
    whole, _ = await fork(catalog, parent)
    assert (whole.default_model_id, whole.next_model_id) == ("fake", "second")
    past, made = await fork(catalog, parent, "past", revision=1)
    assert (past.default_model_id, past.next_model_id) == ("second", "")
    assert [(e.model_id, e.complete) for e in made.encodings] == [("fake", True), ("second", True)]


async def test_what_is_refused_leaves_nothing(catalog: Catalog, parent: MemoryRow) -> None:
    with pytest.raises(AlreadyExistsError):
        await fork(catalog, parent, parent.memory_id)
    with pytest.raises(ConflictError):
        await fork(catalog, replace(parent, revision=3))
    with pytest.raises(NotFoundError):
        await fork(catalog, replace(parent, uid=new_uid()))
    request = request_record("r1", method="ForkMemory", payload="p")
    await fork(catalog, parent, "first", request=request)
    with pytest.raises(RequestRepeatedError):
        await fork(catalog, parent, "second", request=request)
    other = request_record("r1", method="ForkMemory", payload="other")
    with pytest.raises(RequestIdReusedError):
        await fork(catalog, parent, "second", request=other)
    listed, _ = await catalog.list_memories(parent.tenant_uid, 10)
    assert {memory.memory_id for memory in listed} == {parent.memory_id, "first"}


async def test_a_restore_is_a_revision_even_of_nothing(catalog: Catalog, parent: MemoryRow) -> None:
    request = request_record("back", method="RestoreMemory")
    row = await catalog.commit_restore(parent.uid, 4, [4, 5, 6], request)
    assert (row.revision, row.document_count) == (5, 2)
    row = await catalog.commit_restore(parent.uid, 5, [], None)
    assert (row.revision, row.document_count) == (6, 2)
    with pytest.raises(RequestRepeatedError):
        await catalog.commit_restore(parent.uid, 6, [], request)
    with pytest.raises(ConflictError):
        await catalog.commit_restore(parent.uid, 5, [], None)
