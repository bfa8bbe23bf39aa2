"""The worker's part of a filter: attributes held in columns, and the mask in front of routing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_adapter.attributes import AttributeIndex
from model_adapter.errors import FieldError, InterruptedQueryError, TooManyItemsError
from model_adapter.filtering import document_filter
from model_adapter.lease import Lease
from model_adapter.masking import MaskedView
from model_adapter.pager import Budgets
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.documents import Role, Source, TextSource
from storage.filters import DocumentFilter, MetadataCondition, matches
from storage.keys import document_key
from storage.lmdb_store import LmdbStore
from storage.store import StoredDocument
from tests.support import filtered
from tests.support.blocks import SEPARATE
from tests.support.pages import ENCODING, TENANT, World, check_view, flip, key, uid

EVEN = DocumentFilter(metadata=(MetadataCondition("is", frozenset(["even"])),))


def index_of(documents: dict[int, Source]) -> AttributeIndex:
    index = AttributeIndex()
    index.add(documents.items())
    return index


# Attributes.


@given(filtered.memories, filtered.filters, st.integers(0, 12))
def test_columns_match_as_documents_do(
    documents: dict[int, Source], wanted: DocumentFilter, cut: int
) -> None:
    index = index_of({n: source for n, source in documents.items() if n <= cut})
    index.add((n, source) for n, source in documents.items() if n > cut)
    expected = [n for n, source in documents.items() if matches(wanted, source)]
    assert index.matching(wanted).tolist() == expected


def test_attributes_hold_no_text_and_are_overwritten() -> None:
    index = index_of({n: TextSource("t", metadata={"secret": "word"}) for n in range(1, 100)})
    held = index._entries.used
    assert b"word" not in held.tobytes() and b"secret" not in held.tobytes()
    assert index.bytes > held.nbytes > 0 and held["pair"].all()
    index.wipe()
    assert not held["pair"].any() and index.bytes == 0


def test_equal_strings_of_two_indexes_are_not_alike() -> None:
    note: dict[int, Source] = {1: TextSource("t", metadata={"k": "v"})}
    pairs = {int(index_of(note)._entries.used["pair"][0]) for _ in range(4)}
    assert len(pairs) == 4


# Leases.


def write(world: World, numbers: range, tokens: int = 5) -> None:
    """Documents that say of themselves whether they are even."""
    world.write(key(1), numbers, tokens)
    world.store().put_documents(
        uid(key(1)),
        [
            StoredDocument(n, n, 0, TextSource("t", metadata={"is": "odd" if n % 2 else "even"}))
            for n in numbers
        ],
    )


def even(view: Lease) -> list[int]:
    found: list[int] = view.numbers_N[view.matching(EVEN)].tolist()
    return found


@pytest.fixture(params=[1 << 20, 1 << 8], ids=["held", "read through"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """With room for the attributes, and without."""
    made = World(budgets=Budgets(1 << 20, 1 << 20, attribute_bytes=request.param))
    yield made
    made.pager.check_integrity()


def test_what_matches_is_of_the_snapshot(world: World) -> None:
    write(world, range(1, 5))
    with world.pager.lease(key(1), 4, 0) as before:
        assert even(before) == [2, 4]
        write(world, range(5, 9))
        with world.pager.lease(key(1), 8, 0) as after:
            assert even(after) == [2, 4, 6, 8]
        assert even(before) == [2, 4]
    world.store().delete_blocks(uid(key(1)), ENCODING, [6])
    world.delete(key(1), [4])
    with world.pager.lease(key(1), 8, 1) as view:
        assert even(view) == [2, 8], "deleted, or without a block"


def test_a_caller_that_left_is_not_looked_for(world: World) -> None:
    write(world, range(1, 5))
    with world.pager.lease(key(1), 4, 0) as view:
        with pytest.raises(InterruptedQueryError):
            view.matching(EVEN, lambda: True)
        assert even(view) == [2, 4]


def test_attributes_go_with_their_memory() -> None:
    world = World()
    write(world, range(1, 5))
    with world.pager.lease(key(1), 4, 0) as view:
        assert even(view) == [2, 4]
    assert world.pager.residency().attribute_bytes > 0
    assert world.pager.evict(TENANT, key(1).memory) > 0
    assert world.pager.residency().attribute_bytes == 0
    world.pager.check_integrity()


def test_a_corrupt_document_matches_nothing_and_hides_no_other(tmp_path: Path) -> None:
    world = World()
    world.stores[TENANT] = LmdbStore(tmp_path / "tenant")
    write(world, range(1, 8))
    flip(world, tmp_path / "tenant", document_key(uid(key(1)), 4))
    with world.pager.lease(key(1), 7, 0) as view:
        assert even(view) == [2, 6]
    world.stores[TENANT].close()


# The mask.


@pytest.mark.parametrize("routing_bytes", [1 << 20, 1 << 12], ids=["resident", "streamed"])
@given(kept=st.sets(st.integers(1, 30)), gathered=st.sampled_from([1, 3, 1 << 16]))
def test_a_masked_memory_is_a_memory_of_what_it_keeps(
    routing_bytes: int, kept: set[int], gathered: int
) -> None:
    world = World(budgets=Budgets(routing_bytes, 1 << 20, slab_bytes=1 << 12))
    world.write(key(1), range(1, 21), tokens=9)
    blocks = [b for n, b in world.blocks[key(1)].items() if n in kept]
    with pytest.MonkeyPatch.context() as patch, world.pager.lease(key(1), 20, 0) as lease:
        patch.setattr("model_adapter.masking._GATHERED_CHUNKS", gathered)
        view = MaskedView(lease, np.isin(lease.numbers_N, sorted(kept)))
        check_view(view, blocks, SEPARATE)
        for number in set(range(1, 25)) - {b.number for b in blocks}:
            with pytest.raises(KeyError):
                view.text(number)


def test_runs_are_lent_and_scattered_documents_are_copied() -> None:
    world = World()
    world.write(key(1), range(1, 9))
    with world.pager.lease(key(1), 8, 0) as lease:
        ((_, whole),) = lease.routing_keys(0)
        (slab,) = MaskedView(lease, lease.numbers_N > 3).routing_keys(0)
        assert slab[1].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        (slab,) = MaskedView(lease, lease.numbers_N % 2 == 0).routing_keys(0)
        assert slab[1].untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


# The wire.


def test_a_filter_off_the_wire() -> None:
    wire = pb.DocumentFilter(
        occurred_from_us=1_000_000,
        roles=[pb.DocumentFilter.TOOL],
        speakers=["Anna"],
        metadata=[pb.DocumentFilter.Metadata(key="k", values=["a", "b"])],
    )
    found = document_filter(pb.RouteRequest(filter=wire))
    assert found is not None and found.occurred_from is not None
    assert found.occurred_from.timestamp() == 1 and found.occurred_before is None
    assert found.roles == {Role.TOOL} and found.speakers == {"Anna"}
    assert found.metadata == (MetadataCondition("k", frozenset("ab")),)
    assert document_filter(pb.QueryRequest()) is None
    assert document_filter(pb.QueryRequest(filter=pb.DocumentFilter())) == DocumentFilter()


@pytest.mark.parametrize(
    ("field", "wire"),
    [
        ("filter.occurred_before_us", pb.DocumentFilter(occurred_before_us=2**62)),
        ("filter.roles", pb.DocumentFilter(roles=[pb.DocumentFilter.ROLE_UNSPECIFIED])),
        ("filter.speakers", pb.DocumentFilter(speakers=["a"] * 65)),
        ("filter.metadata", pb.DocumentFilter(metadata=[pb.DocumentFilter.Metadata(key="k")] * 17)),
        ("filter.metadata.key", pb.DocumentFilter(metadata=[pb.DocumentFilter.Metadata()])),
        (
            "filter.metadata.values",
            pb.DocumentFilter(metadata=[pb.DocumentFilter.Metadata(key="k", values=["v"] * 65)]),
        ),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(field: str, wire: pb.DocumentFilter) -> None:
    with pytest.raises((FieldError, TooManyItemsError)) as refused:
        document_filter(pb.RouteRequest(filter=wire))
    assert refused.value.metadata["field"] == field
