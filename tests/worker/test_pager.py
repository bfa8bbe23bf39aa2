"""The pager against brute force, its budgets, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model_adapter.engine import ModelMismatchError
from model_adapter.errors import (
    CorruptRecordError,
    InterruptedQueryError,
    MemoryChangedError,
    MemoryInUseError,
)
from model_adapter.pager import Budgets
from storage.crypto import MemorySecret
from storage.keys import Kind, block_key, document_key
from storage.layout import KVLayout
from storage.lmdb_store import LmdbStore
from tests.support.blocks import LAYOUTS, SEPARATE, SHARED, encoding_id, make_block
from tests.support.pages import (
    ENCODING,
    OTHER_TENANT,
    TENANT,
    World,
    document_bytes,
    flip,
    key,
    uid,
)

ONE = document_bytes(SEPARATE, 5)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=LAYOUTS, ids=["shared", "separate", "wide"])
def layout(request: pytest.FixtureRequest) -> KVLayout:
    assert isinstance(request.param, KVLayout)
    return request.param


@pytest.mark.parametrize("routing", [0, 700, 1 << 20], ids=["streamed", "part", "resident"])
@pytest.mark.parametrize("content", [0, 500, 1 << 20])
def test_a_view_shows_what_was_written(layout: KVLayout, routing: int, content: int) -> None:
    world = World(layout, Budgets(routing, content, slab_bytes=300))
    for number, tokens in enumerate([1, 5, 64, 65, 3, 200, 8, 1, 1, 17], 1):
        world.write(key(1), [number], tokens)
    with world.pager.lease(key(1), 10, 0) as view:
        world.check(view, key(1), 10)
        world.check(view, key(1), 10)
    held = world.pager.residency()
    assert held.routing_bytes <= routing
    assert held.content_bytes <= content
    world.pager.check_integrity()


def test_an_unknown_memory_is_empty(world: World) -> None:
    with world.pager.lease(key(1), 0, 0) as nothing, world.pager.lease(key(2), 9, 0) as later:
        world.check(nothing, key(1), 0)
        world.check(later, key(2), 9)
        assert list(later.routing_keys(0)) == []
        with pytest.raises(KeyError):
            later.text(1)


def test_a_memory_grows_without_being_read_again(world: World) -> None:
    store = world.store()
    reads: list[tuple[int, int | None]] = []
    load = store.load_routing

    def counted(*arguments: object, **options: object) -> object:
        reads.append(arguments[3:])  # type: ignore[arg-type]  # first and last
        return load(*arguments, **options)  # type: ignore[arg-type]  # passed on as they came

    store.load_routing = counted  # type: ignore[method-assign,assignment]  # a spy
    for last in range(1, 60):
        world.write(key(1), [last], tokens=last)
        with world.pager.lease(key(1), last, 0) as view:
            world.check(view, key(1), last)
    assert reads == [(n, n) for n in range(1, 60)]
    with world.pager.lease(key(1), 59, 0) as view:
        assert len(list(view.routing_keys(0))) < 8, "segments grow geometrically"
    world.pager.check_integrity()


@pytest.mark.parametrize("routing", [0, 3 * ONE, 1 << 20])
def test_a_view_is_a_snapshot(routing: int) -> None:
    world = World(budgets=Budgets(routing, 1 << 20))
    world.write(key(1), [1, 2, 4])
    with world.pager.lease(key(1), 4, 0) as before:
        world.write(key(1), [5, 9])
        with world.pager.lease(key(1), 9, 0) as after:
            world.check(after, key(1), 9)
            world.check(before, key(1), 4)
            with pytest.raises(KeyError):
                before.text(5)
    with world.pager.lease(key(1), 2, 0) as earlier:
        world.check(earlier, key(1), 2)


def test_documents_encoded_late_are_found(world: World) -> None:
    """The memory's last number may lie above what has blocks yet."""
    world.write(key(1), [1, 2])
    with world.pager.lease(key(1), 5, 0) as view:
        world.check(view, key(1), 5)
    world.write(key(1), [4, 5])
    with world.pager.lease(key(1), 5, 0) as view:
        world.check(view, key(1), 5)


def test_a_new_deletion_epoch_reads_afresh(world: World) -> None:
    world.write(key(1), range(1, 6))
    with world.pager.lease(key(1), 5, 0) as old:
        old.content(0, [0, 1, 2, 3, 4])
        world.delete(key(1), [2, 5])
        with world.pager.lease(key(1), 5, 1) as new:
            world.check(new, key(1), 5)
            assert list(old.numbers_N) == [1, 2, 3, 4, 5]
        # A late query of the earlier epoch sees the newer state, not the deleted documents.
        with world.pager.lease(key(1), 5, 0) as late:
            assert late.numbers_N.tolist() == [1, 3, 4]
        world.pager.check_integrity()
    held = world.pager.residency()
    assert held.memories == 1
    world.pager.check_integrity()


def test_tenants_do_not_meet(world: World) -> None:
    world.write(key(1), [1, 2])
    world.write(key(1, OTHER_TENANT), [1, 2, 3], tokens=70)
    with (
        world.pager.lease(key(1), 9, 0) as mine,
        world.pager.lease(key(1, OTHER_TENANT), 9, 0) as theirs,
    ):
        world.check(mine, key(1), 9)
        world.check(theirs, key(1, OTHER_TENANT), 9)
    assert world.pager.evict(OTHER_TENANT) > 0
    with world.pager.lease(key(1), 9, 0) as mine:
        world.check(mine, key(1), 9)


def test_the_least_recently_used_makes_room() -> None:
    world = World(budgets=Budgets(routing_bytes=40 * ONE, content_bytes=0))
    for memory in (1, 2, 3):
        world.write(key(memory), range(1, 17))  # A segment has room for 16 chunks.
    for memory in (1, 2, 1, 3):
        world.pager.lease(key(memory), 16, 0).release()
    held = world.pager.residency()
    assert (held.memories, held.evictions) == (2, 1)
    reads = _routing_reads(world)
    for memory in (1, 3):
        world.pager.lease(key(memory), 16, 0).release()
    assert reads == [], "1 was used after 2, so 2 had to go"
    world.pager.lease(key(2), 16, 0).release()
    assert reads


def _routing_reads(world: World) -> list[object]:
    reads: list[object] = []
    store = world.store()
    load = store.load_routing

    def spy(*arguments: object, **options: object) -> object:
        reads.append(arguments)
        return load(*arguments, **options)  # type: ignore[arg-type]  # passed on as they came

    store.load_routing = spy  # type: ignore[method-assign,assignment]  # a spy
    return reads


def test_pinned_memories_stay_and_the_newcomer_streams() -> None:
    world = World(budgets=Budgets(routing_bytes=20 * ONE, content_bytes=0, slab_bytes=4 * ONE))
    for memory in (1, 2):
        world.write(key(memory), range(1, 17))
    with world.pager.lease(key(1), 16, 0) as first:
        with world.pager.lease(key(2), 16, 0) as second:
            world.check(second, key(2), 16)
            assert len(list(second.routing_keys(0))) > 1
            world.pager.check_integrity()
        world.check(first, key(1), 16)
        assert world.pager.residency().evictions == 0
    with world.pager.lease(key(2), 16, 0) as second:
        reads = _routing_reads(world)
        world.check(second, key(2), 16)
        assert reads == [], "room again, so it became resident"
    world.pager.check_integrity()


def test_evicted_bytes_are_overwritten(world: World) -> None:
    world.write(key(1), range(1, 5))
    view = world.pager.lease(key(1), 4, 0)
    ((_, keys_CE),) = list(view.routing_keys(0))
    view.content(0, [0, 1, 2, 3])
    held = list(world.pager._content._held.values())
    buffers = world.pager._staging._buffers
    assert any(buffer.memory.any() for buffer in buffers)
    assert len(held) == 4
    assert keys_CE.any()
    before = world.pager.residency()
    view.release()
    freed = world.pager.evict(TENANT, key(1).memory)
    assert freed == before.routing_bytes + before.content_bytes
    assert not keys_CE.any()
    assert not any(buffer.memory.any() for buffer in buffers)
    assert all(not c.value_LCE.any() and not _any(c.key_LCE) for c in held)
    after = world.pager.residency()
    assert (after.routing_bytes, after.content_bytes, after.memories) == (0, 0, 0)


def _any(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool(tensor.any())


def test_content_that_makes_room_is_overwritten() -> None:
    world = World(budgets=Budgets(1 << 20, 2 * 2 * ONE))
    world.write(key(1), range(1, 5))
    with world.pager.lease(key(1), 4, 0) as view:
        view.content(0, [0])
        (first,) = world.pager._content._held.values()
        view.content(0, [1, 2, 3])
        assert not first.value_LCE.any()
        world.check(view, key(1), 4)


def test_an_eviction_waits_for_readers(world: World) -> None:
    world.write(key(1), [1, 2])
    view = world.pager.lease(key(1), 2, 0)
    ((_, keys_CE),) = list(view.routing_keys(0))
    with pytest.raises(MemoryInUseError):
        world.pager.evict(TENANT, timeout_s=0.01)
    assert keys_CE.any(), "not wiped under its reader"
    world.pager.check_integrity()
    with ThreadPoolExecutor(1) as threads:
        evicting = threads.submit(world.pager.evict, TENANT)
        world.check(view, key(1), 2)
        view.release()
        assert evicting.result(5) >= 0
    assert not keys_CE.any()
    world.pager.check_integrity()


def test_who_is_ended_before_it_pages_in_leaves_nothing_behind() -> None:
    """Its job was ended by an eviction while it waited for a thread."""
    world = World()
    world.write(key(1), [1, 2])
    with pytest.raises(InterruptedQueryError):
        world.pager.lease(key(1), 2, 0, unwanted=lambda: True, secret=MemorySecret(b"k" * 32, 0))
    assert world.pager.residency().memories == 0
    world.pager.check_integrity()


def test_an_eviction_of_nothing_frees_nothing(world: World) -> None:
    assert world.pager.evict(TENANT) == 0
    assert world.pager.evict(TENANT, key(9).memory) == 0


def test_documents_removed_under_a_view_are_noticed() -> None:
    world = World(budgets=Budgets(0, 0))
    world.write(key(1), range(1, 9))
    with world.pager.lease(key(1), 8, 0) as view:
        world.delete(key(1), [3])
        with pytest.raises(MemoryChangedError):
            list(view.routing_keys(0))
        with pytest.raises(MemoryChangedError):
            view.content(0, [2])
        with pytest.raises(KeyError):
            view.text(3)
    # What was wrong is read afresh, whatever the epoch.
    with world.pager.lease(key(1), 8, 0) as view:
        world.check(view, key(1), 8)


def test_foreign_blocks_are_refused(world: World) -> None:
    """Another model's encoding is not looked at; another layout under the own id is refused."""
    world.write(key(1), [1])
    blocks = [make_block(SHARED, 1)]
    world.store().put_blocks(uid(key(2)), encoding_id(1), SHARED, blocks)
    world.store().put_blocks(uid(key(3)), ENCODING, SHARED, blocks)
    with world.pager.lease(key(2), 1, 0) as view:
        assert view.numbers_N.tolist() == []
    with pytest.raises(ModelMismatchError):
        world.pager.lease(key(3), 1, 0)
    world.pager.check_integrity()
    assert world.pager.residency().routing_bytes == 0


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[World]:
    world = World(budgets=Budgets(1 << 20, 1 << 20))
    world.stores[TENANT] = LmdbStore(tmp_path / "tenant")
    yield world
    world.stores[TENANT].close()


def test_views_over_lmdb(on_disk: World) -> None:
    for number, tokens in enumerate([1, 70, 5, 200, 3], 1):
        on_disk.write(key(1), [number], tokens)
    with on_disk.pager.lease(key(1), 5, 0) as view:
        on_disk.check(view, key(1), 5)


def test_a_corrupt_routing_record_is_named(on_disk: World, tmp_path: Path) -> None:
    on_disk.write(key(1), range(1, 8))
    flip(on_disk, tmp_path / "tenant", block_key(uid(key(1)), Kind.ROUTING, ENCODING, 5))
    with pytest.raises(CorruptRecordError) as caught:
        on_disk.pager.lease(key(1), 7, 0)
    assert caught.value.metadata == {"number": "5", "record": "block"}
    on_disk.pager.check_integrity()
    assert on_disk.pager.residency().memories == 0
    on_disk.write(key(1), [5])  # As memsvc does on this error.
    with on_disk.pager.lease(key(1), 7, 0) as view:
        on_disk.check(view, key(1), 7)


def test_corrupt_content_and_text_are_named(on_disk: World, tmp_path: Path) -> None:
    on_disk.write(key(1), range(1, 8))
    with on_disk.pager.lease(key(1), 7, 0) as view:
        flip(on_disk, tmp_path / "tenant", block_key(uid(key(1)), Kind.CONTENT, ENCODING, 2))
        flip(on_disk, tmp_path / "tenant", document_key(uid(key(1)), 3))
        with pytest.raises(CorruptRecordError) as block:
            view.content(1, [0, 1])
        with pytest.raises(CorruptRecordError) as text:
            view.text(3)
    assert block.value.metadata == {"number": "2", "record": "block"}
    assert text.value.metadata == {"number": "3", "record": "text"}


def test_the_number_of_memories_is_bounded() -> None:
    world = World(budgets=Budgets(1 << 20, 1 << 20, memories=3))
    for memory in range(5):
        world.write(key(memory), [1])
    for memory in range(5):
        world.pager.lease(key(memory), 1, 0).release()
        world.pager.lease(key(100 + memory), 1, 0).release()  # Empty, and still a memory.
        world.pager.check_integrity()
    assert world.pager.residency().memories == 3
    pinned = [world.pager.lease(key(memory), 1, 0) for memory in range(5)]
    for memory, view in enumerate(pinned):
        world.check(view, key(memory), 1)
        view.release()


def test_an_unwanted_page_in_stops_and_is_gone_on_with_later() -> None:
    world = World(budgets=Budgets(1 << 20, 1 << 20, slab_bytes=4 * ONE))
    world.write(key(1), range(1, 41))
    asked: list[bool] = []

    def unwanted() -> bool:
        asked.append(True)
        return len(asked) > 4  # Once at first, and then between slabs.

    with pytest.raises(InterruptedQueryError):
        world.pager.lease(key(1), 40, 0, unwanted)
    world.pager.check_integrity()
    assert world.pager.residency().memories == 1
    reads = _routing_reads(world)
    with world.pager.lease(key(1), 40, 0) as view:
        assert reads[0][3] == 13  # type: ignore[index]  # the first document not yet read
        world.check(view, key(1), 40)


def test_many_threads_under_pressure() -> None:
    """More memories than room, read, appended to and evicted at once."""
    world = World(budgets=Budgets(50 * ONE, 20 * ONE, slab_bytes=8 * ONE))
    lock = threading.Lock()
    for memory in range(6):
        world.write(key(memory), range(1, 20))

    def read(turn: int) -> None:
        name = key(turn % 6)
        if turn % 11 == 10:
            world.pager.evict(TENANT, name.memory, timeout_s=30)
            return
        with lock:
            last = max(world.blocks[name])
            if turn % 4 == 3:
                world.write(name, [last := last + 1], tokens=40)
        with world.pager.lease(name, last, 0) as view:
            with lock:
                expected = [b for n, b in sorted(world.blocks[name].items()) if n <= last]
            numbers = view.numbers_N.tolist()
            assert numbers == [block.number for block in expected]
            for _, keys_CE in view.routing_keys(turn % 2):
                assert keys_CE.float().isfinite().all()
                assert keys_CE.any(dim=1).all(), "no row was wiped under its reader"
            view.content(turn % 2, [0, len(numbers) - 1])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(read, range(240)))
    world.pager.check_integrity()
    assert world.pager.evict(TENANT) > 0
    held = world.pager.residency()
    assert (held.routing_bytes, held.content_bytes, held.memories) == (0, 0, 0)
