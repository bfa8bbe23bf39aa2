"""Content in a pool: pieces never overlap, budgets hold, and what goes is overwritten first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter import content_pool
from model_adapter.content import ContentCache, HeldContent
from model_adapter.content_pool import ContentPool, Place


def zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def content(rows: int, value: float, keys: bool = False) -> HeldContent:
    made = torch.full((2, rows, 8), value).bfloat16()
    return HeldContent(made.clone() if keys else None, made)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 900)), max_size=60),
    budget=st.integers(0, 4000),
)
def test_pieces_are_lent_once(steps: list[tuple[bool, int]], budget: int) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(content_pool, "_ARENA_BYTES", 1024)
    with patch.context():
        pool, lent = ContentPool(budget, zeros), list[tuple[Place, int]]()
        for number, (take, size) in enumerate(steps):
            if take:
                place = pool.take(size)
                if place is not None:
                    assert place.memory.nbytes >= size and not place.memory.any()
                    place.memory.fill_(number % 255 + 1)
                    lent.append((place, number % 255 + 1))
            elif lent:
                place, mark = lent.pop(size % len(lent))
                assert (place.memory == mark).all(), "nobody else wrote there"
                place.memory.zero_()
                pool.give_back(place)
            pool.check_integrity([place for place, _ in lent])
        for place, _ in lent:
            place.memory.zero_()
            pool.give_back(place)
        pool.let_go()
        assert not pool.bytes, "all pieces were joined again"
    patch.undo()


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), max_size=30),
    budget=st.integers(1, 60),
)
def test_the_cache_holds_copies_and_no_more_than_fit(
    sizes: list[tuple[int, int]], budget: int
) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(content_pool, "_ARENA_BYTES", 512)
    cache, last = ContentCache(32 * budget, ContentPool(32 * budget, zeros)), dict[int, int]()
    for number, rows in sizes:
        given_ = content(rows, number + 1, keys=bool(rows % 2))
        assert not cache.put("memory", number, given_), "it is the caller's to wipe"
        given_.wipe()
        last[number] = rows
        cache.check_integrity()
        held = cache.get("memory", number)
        assert (held is not None) == (given_.bytes <= 32 * budget)
        for _, other in list(cache):
            found = cache.get("memory", other)
            assert found is not None and found.value_LCE.shape[1] == last[other]
            tensors = [found.value_LCE, *([] if found.key_LCE is None else [found.key_LCE])]
            assert len(tensors) == 1 + last[other] % 2
            assert all((tensor == other + 1).all() for tensor in tensors)
    patch.undo()


def test_what_makes_room_is_overwritten_once_nothing_reads_it() -> None:
    order: list[str] = []
    pool = ContentPool(10_000, zeros)
    cache = ContentCache(320, pool)
    cache.put("memory", 1, content(5, 1.0))
    held = cache.get("memory", 1)
    assert held is not None

    class Reading:
        def synchronize(self) -> None:
            assert held is not None
            order.append("read" if held.value_LCE.any() else "wiped before it was read")

    held.fence = Reading()
    cache.put("memory", 2, content(10, 2.0))
    assert order == ["read"] and cache.drops == 1
    assert cache.get("memory", 1) is None
    assert cache.drop_memory("memory") == 320 and cache.drops == 2
    assert not any(arena.memory.any() for arena in pool._arenas)
    cache.check_integrity()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_what_the_host_has_no_room_for_is_not_held(error: Callable[[], Exception]) -> None:
    asked: list[int] = []

    def none_left(size: int) -> torch.Tensor:
        asked.append(size)
        if len(asked) > 1:
            raise error()
        return zeros(size)

    patch = pytest.MonkeyPatch()
    patch.setattr(content_pool, "_ARENA_BYTES", 320)
    cache = ContentCache(10_000, ContentPool(10_000, none_left))
    for number in (1, 2, 3):
        cache.put("memory", number, content(6, 1.0))
        assert [held for _, held in cache] == [number], "what was there makes room"
    assert asked == [320, 320], "and the host is not asked again"
    patch.undo()
