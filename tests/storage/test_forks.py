"""Memories that share documents: the contract on every store; what is LMDB's and the keys' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.keys import Kind, hidden_key, lineage_key, parse_key
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.memory_store import MemoryStore
from storage.store import KeyMissingError, RecordNotFoundError, TenantStore
from tests.storage.fork_contract import CHILD, ONE, PARENT, ForkContract, blocks, fill, texts
from tests.support.blocks import SHARED, make_block, make_document, memory_uid
from tests.support.keys import tenant_keys


class TestMemoryStore(ForkContract):
    @pytest.fixture
    def store(self) -> TenantStore:
        return MemoryStore()


class TestLmdbStore(ForkContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[TenantStore]:
        store = LmdbStore(tmp_path / "tenant")
        yield store
        store.close()


class TestEncryptedStore(ForkContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[TenantStore]:
        store = LmdbStore(tmp_path / "tenant", keys=tenant_keys(tmp_path))
        yield store
        store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    store = LmdbStore(tmp_path / "tenant", keys=tenant_keys(tmp_path))
    yield store
    store.close()


def test_nothing_is_copied(store: LmdbStore) -> None:
    fill(store, PARENT, 1, 200)
    before = dict(store.iter_raw())
    store.fork(PARENT, CHILD, 200)
    after = dict(store.iter_raw())
    assert before.items() <= after.items()
    added = {key: after[key] for key in after.keys() - before.keys()}
    assert {parse_key(key).kind.name for key in added} == {"INHERITED", "LENT", "ENCODING", "KEYS"}
    assert sum(len(key) + len(value) for key, value in added.items()) < 10_000


def test_a_fork_holds_keys_of_what_it_shows_and_of_nothing_else(
    store: LmdbStore, tmp_path: Path
) -> None:
    fill(store, PARENT, 1, 6)
    store.delete_documents(PARENT, [2])
    store.fork(PARENT, CHILD, 4, without=[3])
    fill(store, CHILD, 5, 5)
    parent, child = store._tree(PARENT), store._tree(CHILD)
    assert parent is not None and child is not None
    assert [n for n in range(1, 7) if child.holds(n)] == [1, 4, 5, 6]

    def same(number: int) -> bool:
        marks = [tree.cipher(number).encrypt(bytes(12), b"", b"") for tree in (parent, child)]
        return marks[0] == marks[1]

    assert [n for n in (0, 1, 4, 5, 6) if same(n)] == [1, 4]


def test_a_key_goes_with_the_last_memory_that_shows_the_document(store: LmdbStore) -> None:
    fill(store, PARENT, 1, 2)
    store.fork(PARENT, CHILD, 2)
    store.delete_documents(PARENT, [1])
    trees = [store._tree(memory) for memory in (PARENT, CHILD)]
    assert [tree.holds(1) for tree in trees if tree] == [False, True]
    store.delete_documents(CHILD, [1])
    trees = [store._tree(memory) for memory in (PARENT, CHILD)]
    assert [tree.holds(1) for tree in trees if tree] == [False, False]
    kinds = {parse_key(k).kind.name for k, _ in store.iter_raw() if parse_key(k).number == 1}
    assert "DOCUMENT" not in kinds and "HIDDEN" not in kinds


def test_a_deleted_parent_keeps_no_key(store: LmdbStore, tmp_path: Path) -> None:
    fill(store, PARENT, 1, 2)
    store.fork(PARENT, CHILD, 2)
    store.delete_memory(PARENT)
    assert tenant_keys(tmp_path).memories() == [CHILD]
    with pytest.raises(RecordNotFoundError):
        store.get_document(PARENT, 1)
    assert texts(store, CHILD) == {1: "5 wrote 1", 2: "5 wrote 2"}


def test_a_fork_needs_the_keys_of_its_parent(store: LmdbStore, tmp_path: Path) -> None:
    fill(store, PARENT, 1, 2)
    store._keeper.destroy(PARENT)  # type: ignore[union-attr]  # encrypted
    with pytest.raises(KeyMissingError):
        store.fork(PARENT, CHILD, 2)
    assert store.memories() == [PARENT]


def test_a_reader_sees_a_fork_with_its_key_alone(store: LmdbStore, tmp_path: Path) -> None:
    """What a worker does: it is given the key of the memory that it is asked about."""
    fill(store, PARENT, 1, 3)
    store.fork(PARENT, CHILD, 2)
    store.delete_documents(CHILD, [1])
    secret = tenant_keys(tmp_path).of(CHILD)

    class OfOne:
        def of(self, memory: bytes) -> object:
            assert memory == CHILD
            return secret

    store.close()
    reader = LmdbReader(tmp_path / "tenant", keys=OfOne())  # type: ignore[arg-type]  # KeySource of one
    assert reader.block_numbers(CHILD, ONE) == [2]
    assert reader.load_routing(CHILD, ONE, SHARED).numbers_N.tolist() == [2]
    assert reader.get_document(CHILD, 2) == make_document(2, "5 wrote 2")
    reader.close()


def test_what_was_inherited_or_let_go_of_is_not_written_again(store: LmdbStore) -> None:
    fill(store, PARENT, 1, 2)
    store.fork(PARENT, CHILD, 2)
    with pytest.raises(ValueError, match="inherited"):
        store.put_documents(CHILD, [make_document(2, "forged")])
    store.delete_documents(CHILD, [1])
    with pytest.raises(RecordNotFoundError):
        store.put_blocks(CHILD, ONE, SHARED, [make_block(SHARED, 1)])
    assert blocks(store, PARENT) == [1, 2]


def test_many_forks_of_one_memory_each_deletable(store: LmdbStore) -> None:
    fill(store, PARENT, 1, 30)
    children = [memory_uid(100 + index) for index in range(60)]
    for index, child in enumerate(children):
        store.fork(PARENT, child, 1 + index % 30)
    assert sorted(store.sharing(PARENT, [1])) == [PARENT, *children]
    store.delete_documents(PARENT, [1])
    for child in children:
        store.delete_memory(child)
    assert blocks(store, PARENT) == list(range(2, 31))
    assert store.sharing(PARENT, [30]) == [PARENT]
    assert {parse_key(key).memory for key, _ in store.iter_raw()} == {PARENT}
    assert "HIDDEN" not in {parse_key(key).kind.name for key, _ in store.iter_raw()}


def test_a_fork_without_a_record_of_its_own_is_known(store: LmdbStore) -> None:
    store.put_documents(PARENT, [make_document(1)])
    store.fork(PARENT, CHILD, 1)
    assert store.memories() == [CHILD, PARENT]
    store.delete_documents(CHILD, [1])
    store.delete_documents(PARENT, [1])
    assert CHILD in store.memories()
    store.delete_memory(CHILD)
    assert {parse_key(key).memory for key, _ in store.iter_raw()} == {PARENT}


def test_a_memory_whose_documents_all_went_is_known_by_its_keys(store: LmdbStore) -> None:
    fill(store, PARENT, 1, 3)
    store.delete_documents(PARENT, [1, 2, 3])
    assert {parse_key(key).kind for key, _ in store.iter_raw()} == {Kind.KEYS}
    assert store.memories() == [PARENT]
    assert list(store.check()) == []
    store.delete_memory(PARENT)
    assert store.memories() == []


def test_damage_of_a_lineage_record_is_found(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "tenant")
    fill(store, PARENT, 1, 2)
    store.fork(PARENT, CHILD, 2)
    store.delete_documents(CHILD, [1])
    key = hidden_key(CHILD, 1)
    store._environment.write(lambda transaction: transaction.put(key, b"x" * 48))
    assert [(f.key, f.problem) for f in store.check()] == [(key.hex(), "damaged")]
    store.close()


def test_a_lineage_without_its_other_side_is_found(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "tenant")
    fill(store, PARENT, 1, 2)
    store.fork(PARENT, CHILD, 2)
    key = lineage_key(PARENT, Kind.LENT, CHILD, 2)
    store._environment.write(lambda transaction: transaction.delete(key))
    assert [f.problem for f in store.check()] == ["half-lineage"]
    store.close()
