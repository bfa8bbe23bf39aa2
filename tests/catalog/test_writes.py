"""Appends and deletions: what becomes visible, what is refused, what is answered twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage.catalog import (
    Catalog,
    ConflictError,
    DocumentRow,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
    TenantRow,
)
from tests.support.catalogs import START_US, append, make_memory, new_documents, request_record


class TestAppend:
    async def test_makes_documents_visible_as_one_revision(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        added = new_documents(memory, [10, 20])
        request = request_record("r1")
        after = await catalog.commit_append(memory.uid, 0, added, request)
        assert (after.revision, after.last_number) == (1, 2)
        assert (after.document_count, after.text_bytes) == (2, 30)
        assert (after.version, after.deletion_epoch) == (memory.version + 1, 0)
        assert after.updated_us > memory.updated_us
        assert await catalog.get_memory(tenant.uid, "memory") == after
        assert await catalog.list_documents(memory.uid, 10) == (added, None)
        assert await catalog.get_document(memory.uid, 2) == added[1]
        assert await catalog.find_request(tenant.uid, "r1") == request

    async def test_a_request_is_that_of_its_memory(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        before = request_record("before")  # As an earlier version recorded it.
        of_one = replace(request_record("of one"), memory_uid="one")
        for done, request in enumerate((before, of_one)):
            memory = await append(catalog, memory, request=request)
            assert await catalog.find_request(tenant.uid, request.request_id) == request
            with pytest.raises(RequestRepeatedError):
                await append(catalog, memory, request=replace(request, memory_uid="one"))
            wrong = RequestIdReusedError if done else RequestRepeatedError
            with pytest.raises(wrong):
                await append(catalog, memory, request=replace(request, memory_uid="another"))

    async def test_numbers_may_leave_gaps(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant)
        documents = [DocumentRow(number, 1, START_US, 1) for number in (3, 8)]
        after = await catalog.commit_append(memory.uid, 0, documents, None)
        assert (after.last_number, after.document_count) == (8, 2)
        assert await catalog.live_numbers(memory.uid, 1, 100) == [3, 8]

    async def test_the_revision_must_be_current(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant)
        after = await append(catalog, memory)
        with pytest.raises(ConflictError) as caught:
            await append(catalog, memory)
        assert not isinstance(caught.value, RequestRepeatedError)
        ahead = DocumentRow(2, 9, START_US, 1)
        with pytest.raises(ConflictError):
            await catalog.commit_append(memory.uid, 8, [ahead], None)
        assert await catalog.get_memory(tenant.uid, "memory") == after

    async def test_numbers_are_never_allocated_twice(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [1, 1])
        memory = await catalog.commit_delete_documents(memory.uid, 1, [2], None)
        await catalog.forget_removed(memory.uid, [2])
        again = DocumentRow(2, 3, START_US, 1)
        with pytest.raises(ConflictError):
            await catalog.commit_append(memory.uid, 2, [again], None)
        assert (await append(catalog, memory)).last_number == 3

    @pytest.mark.parametrize(
        "numbers_and_revisions",
        [[], [(2, 1), (1, 1)], [(1, 1), (1, 1)], [(0, 1)], [(1, 2)], [(1, 0)]],
        ids=["empty", "descending", "double", "zero", "later", "earlier"],
    )
    async def test_malformed_documents_are_refused(
        self,
        catalog: Catalog,
        tenant: TenantRow,
        numbers_and_revisions: list[tuple[int, int]],
    ) -> None:
        memory = await make_memory(catalog, tenant)
        documents = [DocumentRow(number, rev, 1, 1) for number, rev in numbers_and_revisions]
        with pytest.raises(ValueError, match="document"):
            await catalog.commit_append(memory.uid, 0, documents, None)
        assert await catalog.get_memory(tenant.uid, "memory") == memory

    async def test_unknown_memory(self, catalog: Catalog, tenant: TenantRow) -> None:
        with pytest.raises(NotFoundError):
            await catalog.commit_append("0" * 32, 0, [DocumentRow(1, 1, 1, 1)], None)

    async def test_many_documents_at_once(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [3] * 12_000)
        assert (memory.document_count, memory.text_bytes) == (12_000, 36_000)
        assert len(await catalog.live_numbers(memory.uid, 1, 12_000)) == 12_000


class TestRepeats:
    async def test_a_repeated_append_is_told_from_a_conflict(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        request = request_record("r1", payload="p", reply=b"first reply")
        after = await append(catalog, memory, request=request)
        for stale in (memory, after):
            with pytest.raises(RequestRepeatedError) as caught:
                await append(catalog, stale, request=request_record("r1", payload="p", reply=b"2"))
            assert caught.value.record.reply == b"first reply"
        assert await catalog.get_memory(tenant.uid, "memory") == after

    async def test_another_payload_or_method_is_refused(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await make_memory(catalog, tenant)
        after = await append(catalog, memory, request=request_record("r1", payload="p"))
        other_payload = request_record("r1", payload="q")
        other_method = request_record("r1", payload="p", method="PutDocuments")
        for request in (other_payload, other_method):
            for stale in (memory, after):
                with pytest.raises(RequestIdReusedError):
                    await append(catalog, stale, request=request)
        with pytest.raises(RequestIdReusedError):
            await catalog.commit_delete_documents(memory.uid, 1, [1], other_method)
        assert await catalog.get_memory(tenant.uid, "memory") == after
        assert await catalog.live_numbers(memory.uid, 1, 9) == [1]

    async def test_a_conflict_records_no_request(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant)
        await append(catalog, memory)
        with pytest.raises(ConflictError):
            await append(catalog, memory, request=request_record("r1"))
        assert await catalog.find_request(tenant.uid, "r1") is None

    async def test_old_requests_are_purged(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await append(
            catalog, await make_memory(catalog, tenant), request=request_record("old")
        )
        memory = await append(catalog, memory)
        await append(catalog, memory, request=request_record("new"))
        assert await catalog.purge_requests(memory.updated_us) == 1
        assert await catalog.find_request(tenant.uid, "old") is None
        assert await catalog.find_request(tenant.uid, "new") is not None


class TestDeleteDocuments:
    async def test_hides_them_and_moves_the_epoch(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [10, 20, 40])
        request = request_record("d1", method="DeleteDocuments")
        after = await catalog.commit_delete_documents(memory.uid, 1, [3, 1], request)
        assert (after.revision, after.deletion_epoch, after.last_number) == (2, 1, 3)
        assert (after.document_count, after.text_bytes) == (1, 20)
        assert after.version == memory.version + 1
        assert await catalog.get_memory(tenant.uid, "memory") == after
        assert await catalog.live_numbers(memory.uid, 1, 3) == [2]
        page, end = await catalog.list_documents(memory.uid, 10)
        assert ([row.number for row in page], end) == ([2], None)
        with pytest.raises(NotFoundError):
            await catalog.get_document(memory.uid, 1)
        with pytest.raises(RequestRepeatedError):
            await catalog.commit_delete_documents(memory.uid, 1, [3, 1], request)

    async def test_all_or_none(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [1, 1, 1])
        memory = await catalog.commit_delete_documents(memory.uid, 1, [2], None)
        with pytest.raises(NotFoundError) as caught:
            await catalog.commit_delete_documents(memory.uid, 2, [1, 2, 9], request_record("d1"))
        assert caught.value.numbers == (2, 9)
        assert await catalog.get_memory(tenant.uid, "memory") == memory
        assert await catalog.live_numbers(memory.uid, 1, 9) == [1, 3]
        assert await catalog.find_request(tenant.uid, "d1") is None

    async def test_stale_revision_and_nothing_to_delete(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant))
        with pytest.raises(ConflictError):
            await catalog.commit_delete_documents(memory.uid, 0, [1], None)
        with pytest.raises(ValueError, match="at least one"):
            await catalog.commit_delete_documents(memory.uid, 1, [], None)

    async def test_leftovers_are_remembered_until_forgotten(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [1] * 4)
        await catalog.commit_delete_documents(memory.uid, 1, [2, 4], None)
        assert await catalog.removed_numbers(memory.uid) == [2, 4]
        # A live and an unknown number among them do no harm.
        await catalog.forget_removed(memory.uid, [1, 2, 77])
        assert await catalog.removed_numbers(memory.uid) == [4]
        assert await catalog.live_numbers(memory.uid, 1, 9) == [1, 3]


class TestGetDocuments:
    async def test_finds_the_live_ones(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [1, 2, 3])
        await catalog.commit_delete_documents(memory.uid, 1, [2], None)
        found = await catalog.get_documents(memory.uid, [3, 2, 1, 99, 3])
        assert {number: row.text_bytes for number, row in found.items()} == {1: 1, 3: 3}
        assert await catalog.get_documents(memory.uid, []) == {}


class TestListDocuments:
    async def test_pages_by_number(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await append(catalog, await make_memory(catalog, tenant), [1] * 7)
        await catalog.commit_delete_documents(memory.uid, 1, [3], None)
        pages: list[list[int]] = []
        after: int | None = None
        while True:
            page, after = await catalog.list_documents(memory.uid, 3, after)
            pages.append([row.number for row in page])
            if after is None:
                break
        assert pages == [[1, 2, 4], [5, 6, 7]]

    async def test_memories_are_apart(self, catalog: Catalog, tenant: TenantRow) -> None:
        one = await append(catalog, await make_memory(catalog, tenant, "one"), [1])
        two = await append(catalog, await make_memory(catalog, tenant, "two"), [2, 2])
        assert await catalog.live_numbers(one.uid, 1, 9) == [1]
        assert await catalog.live_numbers(two.uid, 2, 2) == [2]
        await catalog.commit_delete_documents(one.uid, 1, [1], None)
        assert await catalog.live_numbers(two.uid, 1, 9) == [1, 2]
