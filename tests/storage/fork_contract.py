"""What a store must do with memories that share documents. Subclasses give a `store` fixture."""

from __future__ import annotations

import pytest

from storage.store import LetGo, MemoryUid, RecordNotFoundError, TenantStore
from tests.support.blocks import SHARED, encoding_id, make_block, make_document, memory_uid

PARENT, CHILD, GRANDCHILD = memory_uid(5), memory_uid(3), memory_uid(7)
ONE, TWO = encoding_id(1), encoding_id(2)


def fill(store: TenantStore, memory: MemoryUid, first: int, last: int) -> None:
    """Documents first..last, each with a block and a text that names memory and number."""
    numbers = range(first, last + 1)
    store.put_documents(memory, [make_document(n, f"{memory[-1]} wrote {n}") for n in numbers])
    store.put_blocks(memory, ONE, SHARED, [make_block(SHARED, n, seed=memory[-1]) for n in numbers])


def texts(store: TenantStore, memory: MemoryUid) -> dict[int, str]:
    """Each document's own words, read one by one and in a scan, which must agree."""
    found = {d.number: d for d in store.iter_documents(memory)}
    assert list(found) == store.document_numbers(memory)
    assert all(store.get_document(memory, number) == one for number, one in found.items())
    return {n: d.source.turns[0].text for n, d in found.items()}  # type: ignore[union-attr]  # make_document's


def blocks(store: TenantStore, memory: MemoryUid) -> list[int]:
    """Numbers of the blocks, each of which is read."""
    numbers = store.block_numbers(memory, ONE)
    packed = store.load_routing(memory, ONE, SHARED)
    assert packed.numbers_N.tolist() == numbers
    assert [p.number for p in store.iter_routing(memory, ONE, SHARED)] == numbers
    assert [p.number for p in store.iter_content(memory, ONE, SHARED)] == numbers
    for number in numbers:
        assert store.get_content(memory, ONE, SHARED, number).number == number
    return numbers


class ForkContract:
    """Shared by the oracle and LMDB, plain and encrypted."""

    def test_a_fork_shows_what_was_there_and_goes_its_own_way(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 4)
        store.fork(PARENT, CHILD, 3)
        fill(store, PARENT, 5, 5)
        fill(store, CHILD, 4, 5)
        assert texts(store, CHILD) == {n: f"{5 if n < 4 else 3} wrote {n}" for n in range(1, 6)}
        assert texts(store, PARENT) == {n: f"5 wrote {n}" for n in range(1, 6)}
        assert blocks(store, CHILD) == blocks(store, PARENT) == [1, 2, 3, 4, 5]
        assert store.memories() == [CHILD, PARENT]
        assert store.encodings(CHILD) == [ONE]
        assert store.encoding_layout(CHILD, ONE) == SHARED
        assert list(store.check()) == []

    def test_deleting_in_one_does_not_show_in_the_other(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 4)
        store.fork(PARENT, CHILD, 4)
        assert store.delete_documents(PARENT, [1, 2]) == LetGo(shared=(1, 2))
        assert store.delete_documents(CHILD, [2, 3]) == LetGo(texts=1, blocks=1, shared=(3,))
        assert texts(store, PARENT).keys() == {3, 4}
        assert texts(store, CHILD).keys() == {1, 4}
        assert blocks(store, PARENT) == [3, 4]
        assert blocks(store, CHILD) == [1, 4]
        with pytest.raises(RecordNotFoundError):
            store.get_document(PARENT, 1)
        with pytest.raises(RecordNotFoundError):
            store.get_content(CHILD, ONE, SHARED, 3)
        assert list(store.check()) == []

    def test_a_parent_can_go_and_its_fork_stays_whole(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 4)
        store.fork(PARENT, CHILD, 2)
        assert store.delete_memory(PARENT) == LetGo(texts=2, blocks=2, shared=(1, 2))
        store.delete_memory(PARENT)  # Twice is no error.
        assert store.memories() == [CHILD]
        assert texts(store, PARENT) == {}
        assert store.block_numbers(PARENT, ONE) == []
        assert store.encodings(PARENT) == []
        assert texts(store, CHILD).keys() == {1, 2}
        assert blocks(store, CHILD) == [1, 2]
        assert list(store.check()) == []
        fill(store, CHILD, 3, 3)
        assert store.delete_documents(CHILD, [1]) == LetGo(texts=1, blocks=1)
        assert store.delete_memory(CHILD) == LetGo(texts=2, blocks=2)
        assert store.memories() == []
        assert list(store.check()) == []

    def test_a_fork_can_go_and_its_parent_stays_whole(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 3)
        store.fork(PARENT, CHILD, 3)
        fill(store, CHILD, 4, 4)
        store.delete_documents(PARENT, [2])
        assert store.delete_memory(CHILD) == LetGo(texts=2, blocks=2, shared=(1, 3))
        assert texts(store, PARENT).keys() == {1, 3}
        assert blocks(store, PARENT) == [1, 3]
        assert store.memories() == [PARENT]
        assert list(store.check()) == []

    def test_forks_of_forks_share_with_all_before_them(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 3)
        store.fork(PARENT, CHILD, 3)
        fill(store, CHILD, 4, 5)
        store.delete_documents(CHILD, [1])
        store.fork(CHILD, GRANDCHILD, 4, without=[2])
        fill(store, GRANDCHILD, 5, 5)
        expected = {3: "5 wrote 3", 4: "3 wrote 4", 5: "7 wrote 5"}
        assert texts(store, GRANDCHILD) == expected
        store.delete_memory(CHILD)
        assert texts(store, GRANDCHILD) == expected
        assert blocks(store, GRANDCHILD) == [3, 4, 5]
        store.delete_memory(PARENT)
        assert texts(store, GRANDCHILD) == expected
        assert blocks(store, GRANDCHILD) == [3, 4, 5]
        assert store.memories() == [GRANDCHILD]
        assert list(store.check()) == []
        assert store.delete_memory(GRANDCHILD) == LetGo(texts=3, blocks=3)
        assert list(store.check()) == []

    def test_a_fork_of_an_earlier_point_skips_what_came_later(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 2)
        store.fork(PARENT, CHILD, 2)
        fill(store, CHILD, 3, 4)
        store.fork(CHILD, GRANDCHILD, 1)
        fill(store, GRANDCHILD, 2, 2)
        assert texts(store, GRANDCHILD) == {1: "5 wrote 1", 2: "7 wrote 2"}
        store.delete_memory(PARENT)
        store.delete_memory(CHILD)
        assert texts(store, GRANDCHILD) == {1: "5 wrote 1", 2: "7 wrote 2"}
        assert list(store.check()) == []

    def test_a_block_that_one_makes_serves_both(self, store: TenantStore) -> None:
        store.put_documents(PARENT, [make_document(1), make_document(2)])
        store.put_blocks(PARENT, ONE, SHARED, [make_block(SHARED, 1)])
        store.fork(PARENT, CHILD, 2)
        store.put_blocks(CHILD, ONE, SHARED, [make_block(SHARED, 2)])
        assert blocks(store, PARENT) == blocks(store, CHILD) == [1, 2]
        store.delete_memory(PARENT)
        assert blocks(store, CHILD) == [1, 2]
        store.put_blocks(CHILD, ONE, SHARED, [make_block(SHARED, 1, tokens=9)])
        assert store.load_routing(CHILD, ONE, SHARED).tokens_N.tolist() == [9, 5]
        assert list(store.check()) == []

    def test_a_model_of_the_fork_alone_is_no_matter_to_its_parent(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 2)
        store.fork(PARENT, CHILD, 2)
        store.put_blocks(CHILD, TWO, SHARED, [make_block(SHARED, 1)])
        assert store.encodings(PARENT) == [ONE]
        assert store.encodings(CHILD) == [ONE, TWO]
        assert list(store.check()) == []
        store.delete_memory(PARENT)
        assert list(store.check()) == []
        store.delete_encoding(CHILD, TWO)
        assert store.block_numbers(CHILD, TWO) == []
        assert blocks(store, CHILD) == [1, 2]
        assert list(store.check()) == []

    def test_detaching_the_parent_leaves_the_fork_its_blocks(self, store: TenantStore) -> None:
        fill(store, PARENT, 1, 3)
        store.fork(PARENT, CHILD, 2)
        store.delete_encoding(PARENT, ONE)
        assert store.encodings(PARENT) == []
        assert 3 not in store.block_numbers(PARENT, ONE)
        assert blocks(store, CHILD) == [1, 2]
        assert list(store.check()) == []
        store.delete_encoding(CHILD, ONE)
        assert store.block_numbers(CHILD, ONE) == []
        assert list(store.check()) == []

    def test_an_empty_memory_can_be_forked(self, store: TenantStore) -> None:
        store.fork(PARENT, CHILD, 0)
        fill(store, CHILD, 1, 1)
        assert texts(store, CHILD) == {1: "3 wrote 1"}
        assert texts(store, PARENT) == {}
        assert list(store.check()) == []

    def test_what_a_fork_let_go_of_does_not_come_back_with_anothers_number(
        self, store: TenantStore
    ) -> None:
        fill(store, PARENT, 1, 3)
        store.fork(PARENT, CHILD, 2)
        fill(store, CHILD, 3, 3)
        store.fork(CHILD, GRANDCHILD, 3)
        store.delete_documents(GRANDCHILD, [3])
        assert texts(store, GRANDCHILD).keys() == {1, 2}
        store.delete_documents(PARENT, [3])
        assert texts(store, GRANDCHILD).keys() == {1, 2}
        assert texts(store, CHILD) == {1: "5 wrote 1", 2: "5 wrote 2", 3: "3 wrote 3"}
        assert blocks(store, GRANDCHILD) == [1, 2]
        assert list(store.check()) == []
