"""What a lease finds by a question's words, as its memory changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_adapter.errors import InterruptedQueryError
from model_adapter.lease import Lease
from model_adapter.pager import Budgets
from storage.keys import document_key
from storage.lmdb_store import LmdbStore
from tests.support.pages import ENCODING, OTHER_TENANT, TENANT, World, flip, key, uid


@pytest.fixture
def world() -> World:
    return World()


def everything(question: str, view: Lease) -> list[int]:
    found = view.words(question, 1000)
    assert found is not None
    return sorted(found)


def test_words_are_those_of_the_snapshot(world: World) -> None:
    world.write(key(1), [1, 2, 4])
    world.write(key(2), [7])
    with world.pager.lease(key(1), 4, 0) as before:
        assert everything("which document?", before) == [1, 2, 4]
        world.write(key(1), [5, 9])
        with world.pager.lease(key(1), 9, 0) as after:
            assert everything("which document?", after) == [1, 2, 4, 5, 9]
            assert everything("9", after) == [9]
        assert everything("which document?", before) == [1, 2, 4]
        assert everything("9", before) == []
    with world.pager.lease(key(2), 9, 0) as other:
        assert everything("which document?", other) == [7]
    with world.pager.lease(key(1, OTHER_TENANT), 9, 0) as foreign:
        assert everything("which document?", foreign) == []
    world.pager.check_integrity()


def test_only_documents_with_a_block_are_found_by_words(world: World) -> None:
    world.write(key(1), [1, 2, 3])
    world.store().delete_blocks(uid(key(1)), ENCODING, [2])
    with world.pager.lease(key(1), 3, 0) as view:
        assert everything("which document?", view) == [1, 3]


def test_words_of_deleted_documents_go_with_the_epoch_and_with_eviction(world: World) -> None:
    world.write(key(1), range(1, 6))
    with world.pager.lease(key(1), 5, 0) as view:
        assert everything("which document?", view) == [1, 2, 3, 4, 5]
    held = world.pager.residency().lexical_bytes
    assert held > 0
    world.delete(key(1), [2, 5])
    with world.pager.lease(key(1), 5, 1) as view:
        assert everything("which document?", view) == [1, 3, 4]
        assert world.pager.residency().lexical_bytes <= held, "the old index is gone"
    assert world.pager.evict(TENANT, key(1).memory) > 0
    assert world.pager.residency().lexical_bytes == 0
    world.pager.check_integrity()


def test_without_room_for_an_index_there_are_no_words() -> None:
    world = World(budgets=Budgets(1 << 20, 1 << 20, lexical_bytes=1 << 12))
    world.write(key(1), range(1, 6))
    with world.pager.lease(key(1), 5, 0) as view:
        assert view.words("which document?", 10) is None
        world.check(view, key(1), 5)
    world.pager.check_integrity()


def test_a_caller_that_left_is_not_indexed_for(world: World) -> None:
    world.write(key(1), range(1, 6))
    with world.pager.lease(key(1), 5, 0) as view:
        with pytest.raises(InterruptedQueryError):
            view.words("which document?", 10, lambda: True)
        assert everything("which document?", view) == [1, 2, 3, 4, 5]


def test_a_corrupt_text_is_not_found_by_words_and_hides_no_other(
    tmp_path: Path,
) -> None:
    on_disk = World()
    on_disk.stores[TENANT] = LmdbStore(tmp_path / "tenant")
    on_disk.write(key(1), range(1, 8))
    on_disk.store().delete_blocks(uid(key(1)), ENCODING, [5])
    for number in (1, 3, 5, 7):
        flip(on_disk, tmp_path / "tenant", document_key(uid(key(1)), number))
    with on_disk.pager.lease(key(1), 7, 0) as view:
        assert everything("which document?", view) == [2, 4, 6]
    on_disk.stores[TENANT].close()
