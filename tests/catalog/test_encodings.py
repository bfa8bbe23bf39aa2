"""Encoding progress: watermarks, what waits, and in which order."""

from __future__ import annotations

import pytest

from storage.catalog import (
    Catalog,
    ConflictError,
    EncodingRow,
    EncodingState,
    MemoryRow,
    MemoryState,
    NotFoundError,
    TenantRow,
)
from tests.support.catalogs import append, make_memory, model_row

IDENTITY = "identity-1"


async def encoding_of(catalog: Catalog, memory: MemoryRow, model_id: str = "fake") -> EncodingRow:
    row = await catalog.get_encoding(memory.uid, model_id)
    assert row is not None
    return row


async def backlog(catalog: Catalog, model_id: str = "fake") -> list[str]:
    return [memory.memory_id for _, memory, _ in await catalog.backlog(model_id, 10)]


@pytest.fixture
async def memory(catalog: Catalog, tenant: TenantRow) -> MemoryRow:
    """Documents 1 to 5 of 10 bytes each, in revisions 1 (three) and 2 (two)."""
    await catalog.upsert_model(model_row())
    memory = await append(catalog, await make_memory(catalog, tenant), [10] * 3)
    return await append(catalog, memory, [10] * 2)


async def encode(catalog: Catalog, memory: MemoryRow, up_to: int, **counts: int) -> EncodingRow:
    """Commits blocks of every document up to that number, 100 tokens and bytes in all."""
    documents = counts.get("documents", up_to)
    return await catalog.commit_encoded(
        memory.uid, "fake", IDENTITY, up_to, documents, 100, 1000, {}
    )


class TestProgress:
    async def test_an_empty_memory_is_ready(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant)
        row = await catalog.ensure_encoding(memory.uid, "fake", IDENTITY)
        assert (row.state, row.encoded_revision) == (EncodingState.READY, 0)
        assert await catalog.ensure_encoding(memory.uid, "fake", IDENTITY) == row
        assert await catalog.list_encodings(memory.uid) == [row]

    async def test_waits_then_moves_with_the_watermark(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        waiting = await encoding_of(catalog, memory)
        assert (waiting.state, waiting.pending_documents) == (EncodingState.ENCODING, 5)
        assert (waiting.encoded_number, waiting.encoded_revision) == (0, 0)
        some = await encode(catalog, memory, 3)
        assert (some.encoded_documents, some.pending_documents) == (3, 2)
        assert (some.encoded_revision, some.tokens, some.bytes) == (1, 100, 1000)
        done = await encode(catalog, memory, 5, documents=2)
        assert (done.state, done.encoded_revision) == (EncodingState.READY, 2)
        assert (done.encoded_documents, done.tokens, done.bytes) == (5, 200, 2000)
        assert await catalog.next_numbers(memory.uid, "fake", 10) == []

    async def test_part_of_a_revision_does_not_count_as_it(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        assert (await encode(catalog, memory, 2)).encoded_revision == 0
        assert (await encode(catalog, memory, 4)).encoded_revision == 1

    async def test_a_deletion_alone_keeps_it_ready(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await encode(catalog, memory, 5)
        after = await catalog.commit_delete_documents(memory.uid, 2, [2], None)
        row = await encoding_of(catalog, memory)
        assert (row.state, row.encoded_revision) == (EncodingState.READY, after.revision)
        assert (row.encoded_documents, row.tokens, row.bytes) == (4, 80, 800)

    async def test_deleting_what_waits_makes_it_ready(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await encode(catalog, memory, 3)
        await catalog.commit_delete_documents(memory.uid, 2, [4, 5], None)
        row = await encoding_of(catalog, memory)
        assert (row.state, row.pending_documents) == (EncodingState.READY, 0)
        assert (row.encoded_documents, row.tokens) == (3, 100)
        assert await backlog(catalog) == []

    async def test_deleting_everything_leaves_no_sizes(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await encode(catalog, memory, 4)
        await catalog.commit_delete_documents(memory.uid, 2, range(1, 6), None)
        row = await encoding_of(catalog, memory)
        assert (row.encoded_documents, row.pending_documents) == (0, 0)
        assert (row.tokens, row.bytes) == (0, 0)

    async def test_next_numbers_skip_what_is_deleted(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.commit_delete_documents(memory.uid, 2, [2], None)
        assert await catalog.next_numbers(memory.uid, "fake", 3) == [1, 3, 4]
        assert await catalog.next_numbers(memory.uid, "unknown", 3) == []

    async def test_models_are_apart(self, catalog: Catalog, memory: MemoryRow) -> None:
        await catalog.ensure_encoding(memory.uid, "other", "x")
        await encode(catalog, memory, 5)
        rows = await catalog.list_encodings_for([memory.uid, "0" * 32])
        assert [(row.model_id, row.pending_documents) for row in rows[memory.uid]] == [
            ("fake", 0),
            ("other", 5),
        ]
        assert rows["0" * 32] == []


class TestCommitEncoded:
    async def test_quarantined_documents_are_set_aside(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        row = await catalog.commit_encoded(
            memory.uid, "fake", IDENTITY, 5, 3, 90, 900, {2: "too long", 4: "empty"}
        )
        assert (row.state, row.encoded_documents) == (EncodingState.READY, 3)
        assert row.quarantined_documents == 2
        assert await catalog.quarantined(memory.uid, "fake") == {2: "too long", 4: "empty"}
        await catalog.commit_delete_documents(memory.uid, 2, [2], None)
        row = await encoding_of(catalog, memory)
        assert (row.encoded_documents, row.quarantined_documents, row.tokens) == (3, 1, 90)
        assert await catalog.quarantined(memory.uid, "fake") == {4: "empty"}

    async def test_documents_deleted_meanwhile_count_no_more(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.commit_delete_documents(memory.uid, 2, [1, 2], None)
        row = await catalog.commit_encoded(
            memory.uid, "fake", IDENTITY, 3, 2, 90, 900, {2: "too long"}
        )
        assert (row.encoded_documents, row.quarantined_documents) == (1, 0)
        assert row.pending_documents == 2

    async def test_another_identity_is_refused(self, catalog: Catalog, memory: MemoryRow) -> None:
        with pytest.raises(ConflictError):
            await catalog.commit_encoded(memory.uid, "fake", "identity-2", 5, 5, 1, 1, {})
        assert (await encoding_of(catalog, memory)).encoded_number == 0

    async def test_the_watermark_only_moves_forward_within_the_memory(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        done = await encode(catalog, memory, 3)
        for up_to in (2, 3, 6):
            with pytest.raises(ConflictError):
                await encode(catalog, memory, up_to)
        assert await encoding_of(catalog, memory) == done

    async def test_a_batch_from_before_a_rewind_is_refused(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await encode(catalog, memory, 3)
        await catalog.rewind_encoding(memory.uid, "fake", 2)
        with pytest.raises(ConflictError):
            await encode(catalog, memory, 5, documents=2)
        assert (await encoding_of(catalog, memory)).encoded_number == 1

    async def test_as_many_deleted_as_were_put_back_make_no_difference(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        """Else the watermark would pass documents whose blocks are to be made again."""
        await encode(catalog, memory, 3)
        await catalog.rewind_encoding(memory.uid, "fake", 3)
        await catalog.commit_delete_documents(memory.uid, 2, [5], None)
        with pytest.raises(ConflictError):
            await catalog.commit_encoded(
                memory.uid, "fake", IDENTITY, 5, 2, 1, 1, {}, above_number=3
            )
        row = await encoding_of(catalog, memory)
        assert (row.encoded_number, row.pending_documents) == (2, 2)
        await catalog.commit_encoded(memory.uid, "fake", IDENTITY, 5, 2, 1, 1, {}, above_number=2)

    async def test_quarantine_outside_the_batch_is_refused(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        with pytest.raises(ValueError, match="outside"):
            await catalog.commit_encoded(memory.uid, "fake", IDENTITY, 3, 3, 1, 1, {4: "x"})
        assert (await encoding_of(catalog, memory)).encoded_number == 0

    async def test_unknown_memory_and_encoding(self, catalog: Catalog, memory: MemoryRow) -> None:
        with pytest.raises(NotFoundError):
            await catalog.commit_encoded("0" * 32, "fake", IDENTITY, 1, 1, 1, 1, {})
        with pytest.raises(NotFoundError):
            await catalog.commit_encoded(memory.uid, "unknown", IDENTITY, 1, 1, 1, 1, {})
        with pytest.raises(NotFoundError):
            await catalog.ensure_encoding("0" * 32, "fake", IDENTITY)
        assert await catalog.get_encoding(memory.uid, "unknown") is None


class TestIdentity:
    async def test_a_new_identity_starts_over(self, catalog: Catalog, memory: MemoryRow) -> None:
        await catalog.commit_encoded(memory.uid, "fake", IDENTITY, 5, 4, 9, 9, {5: "x"})
        row = await catalog.ensure_encoding(memory.uid, "fake", "identity-2")
        assert (row.identity, row.encoded_number, row.pending_documents) == ("identity-2", 0, 5)
        assert (row.tokens, row.bytes, row.quarantined_documents) == (0, 0, 0)
        assert await catalog.quarantined(memory.uid, "fake") == {}

    async def test_a_model_of_a_new_identity_makes_all_wait_again(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.commit_encoded(memory.uid, "fake", IDENTITY, 5, 4, 9, 9, {5: "x"})
        await catalog.upsert_model(model_row(seen_us=2))
        assert (await encoding_of(catalog, memory)).state is EncodingState.READY
        await catalog.upsert_model(model_row(identity="identity-2"))
        row = await encoding_of(catalog, memory)
        assert (row.identity, row.pending_documents) == ("identity-2", 5)
        assert await catalog.quarantined(memory.uid, "fake") == {}


class TestRewind:
    async def test_documents_from_that_number_wait_again(
        self, catalog: Catalog, memory: MemoryRow
    ) -> None:
        await catalog.commit_encoded(
            memory.uid, "fake", IDENTITY, 5, 3, 90, 900, {1: "first", 4: "later"}
        )
        await catalog.rewind_encoding(memory.uid, "fake", 3)
        row = await encoding_of(catalog, memory)
        assert (row.encoded_number, row.pending_documents, row.quarantined_documents) == (2, 3, 1)
        assert (row.encoded_documents, row.tokens, row.bytes) == (1, 30, 300)
        assert await catalog.quarantined(memory.uid, "fake") == {1: "first"}
        assert await catalog.next_numbers(memory.uid, "fake", 9) == [3, 4, 5]

    async def test_a_lower_watermark_stays(self, catalog: Catalog, memory: MemoryRow) -> None:
        done = await encode(catalog, memory, 2)
        await catalog.rewind_encoding(memory.uid, "fake", 4)
        assert await encoding_of(catalog, memory) == done
        await catalog.rewind_encoding(memory.uid, "fake", 1)
        row = await encoding_of(catalog, memory)
        assert (row.encoded_number, row.pending_documents, row.tokens) == (0, 5, 0)

    async def test_numbers_start_at_one(self, catalog: Catalog, memory: MemoryRow) -> None:
        with pytest.raises(ValueError, match="start at 1"):
            await catalog.rewind_encoding(memory.uid, "fake", 0)


class TestFailure:
    async def test_stops_until_resumed(self, catalog: Catalog, memory: MemoryRow) -> None:
        await catalog.fail_encoding(memory.uid, "fake", "worker refuses")
        row = await encoding_of(catalog, memory)
        assert (row.state, row.failure) == (EncodingState.FAILED, "worker refuses")
        assert await backlog(catalog) == []
        assert await catalog.pending_by_tenant("fake") == {memory.tenant_uid: (5, 50)}
        assert await catalog.resume_encodings("fake") == 1
        assert await catalog.resume_encodings("fake") == 0
        assert (await encoding_of(catalog, memory)).state is EncodingState.ENCODING
        assert await backlog(catalog) == ["memory"]

    async def test_progress_and_rewind_clear_it(self, catalog: Catalog, memory: MemoryRow) -> None:
        await catalog.fail_encoding(memory.uid, "fake", "x")
        assert (await encode(catalog, memory, 1)).failure == ""
        await catalog.fail_encoding(memory.uid, "fake", "x")
        await catalog.rewind_encoding(memory.uid, "fake", 1)
        assert (await encoding_of(catalog, memory)).state is EncodingState.ENCODING

    async def test_deleting_what_waits_clears_it(self, catalog: Catalog, memory: MemoryRow) -> None:
        await encode(catalog, memory, 3)
        await catalog.fail_encoding(memory.uid, "fake", "x")
        await catalog.commit_delete_documents(memory.uid, 2, [1], None)
        assert (await encoding_of(catalog, memory)).state is EncodingState.FAILED
        await catalog.commit_delete_documents(memory.uid, 3, [4], None)
        assert (await encoding_of(catalog, memory)).state is EncodingState.ENCODING

    async def test_nothing_waiting_cannot_fail(self, catalog: Catalog, memory: MemoryRow) -> None:
        await encode(catalog, memory, 5)
        await catalog.fail_encoding(memory.uid, "fake", "x")
        await append(catalog, memory)
        assert (await encoding_of(catalog, memory)).state is EncodingState.ENCODING
        with pytest.raises(ValueError, match="reason"):
            await catalog.fail_encoding(memory.uid, "fake", "")


class TestBacklog:
    async def test_the_longest_waiting_document_comes_first(
        self, catalog: Catalog, tenant: TenantRow, memory: MemoryRow
    ) -> None:
        # Test documents are dated by the revision that their memory had.
        late = await append(catalog, await make_memory(catalog, tenant, "late"), [7])
        assert await backlog(catalog) == sorted(
            ["memory", "late"], key={"memory": memory.uid, "late": late.uid}.__getitem__
        )
        await encode(catalog, memory, 3)
        assert await backlog(catalog) == ["late", "memory"]
        (uid, first, row), *_ = await catalog.backlog("fake", 1)
        assert (uid, first, row.pending_documents) == (tenant.uid, late, 1)
        assert await catalog.pending_by_tenant("fake") == {tenant.uid: (3, 27)}

    async def test_a_tenant_with_many_memories_does_not_fill_the_page(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.upsert_model(model_row())
        for number in range(6):
            await append(catalog, await make_memory(catalog, tenant, f"many{number}"), [1])
        for name in ("b", "c"):
            other = await catalog.create_tenant(name, "")
            await append(catalog, await make_memory(catalog, other, f"one-{name}"), [1, 1])
        page = [memory.memory_id for _, memory, _ in await catalog.backlog("fake", 4)]
        assert {"one-b", "one-c"} < set(page)
        assert len(page) == 4
        assert len(await catalog.backlog("fake", 100)) == 8
        assert sorted((await catalog.pending_by_tenant("fake")).values()) == [
            (2, 2),
            (2, 2),
            (6, 6),
        ]

    async def test_only_active_memories(self, catalog: Catalog, tenant: TenantRow) -> None:
        await catalog.upsert_model(model_row())
        importing = await make_memory(catalog, tenant, "i", state=MemoryState.IMPORTING)
        await append(catalog, importing, [5])
        await append(catalog, await make_memory(catalog, tenant, "d"), [5])
        await catalog.begin_delete_memory(tenant.uid, "d", None)
        assert await backlog(catalog) == []
        await catalog.activate_memory(importing.uid)
        assert await backlog(catalog) == ["i"]
        assert await catalog.pending_by_tenant("fake") == {tenant.uid: (1, 5)}
