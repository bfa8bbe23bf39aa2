"""Content fetched by the kernel is what was written, wherever it lies and whatever was dropped.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest.mock import Mock, patch

import numpy as np
import numpy.typing as npt
import pytest
import torch

from model_adapter import fetching
from model_adapter.fetching import Fetcher
from model_adapter.lease import Lease
from model_adapter.msa.kernels import KeyFormat, KeyStorage
from model_adapter.pager import Budgets
from storage.layout import KVLayout
from tests.support.blocks import LAYOUTS, SEPARATE, SHARED
from tests.support.pages import TENANT, World, bits, joined, key

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
pytest.importorskip("triton", reason="the kernel needs triton, a part of the dev requirements")

_Numbers = npt.NDArray[np.int64]
CPU = torch.device("cpu")
TOKENS = [1, 5, 20, 9, 3, 33, 8, 1, 1, 17]
ODD = KVLayout((7,), 1, 3, 1, "bf16", separate_routing_keys=False)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each takes several rows; the interpreter runs them one after another."""
    monkeypatch.setattr(fetching, "_PROGRAMS", 3)
    fetching._launch.cache_clear()
    yield
    fetching._launch.cache_clear()


def filled(layout: KVLayout, budgets: Budgets, storing: KeyStorage | None = None) -> World:
    """Documents that came one by one: several segments. Its pager fetches."""
    world = World(layout, budgets)
    world.pager = world.new_pager(budgets, storing, Fetcher(CPU, layout))
    for number, tokens in enumerate(TOKENS, 1):
        world.write(key(1), [number], tokens)
        world.pager.lease(key(1), number, 0).release()
    return world


def check_layers(view: Lease, world: World, picks: list[int]) -> None:
    chosen = [world.blocks[key(1)][int(view.numbers_N[pick])] for pick in picks]
    for layer in range(len(world.layout.routed_layers)):
        keys_RE, values_RE = view.content(layer, picks)
        assert (bits(keys_RE) == joined(chosen, "key", layer, world.layout)).all()
        assert (bits(values_RE) == joined(chosen, "value", layer, world.layout)).all()


def spy(name: str) -> AbstractContextManager[Mock]:
    """Counts calls of a Fetcher's, which are made."""
    return patch.object(Fetcher, name, autospec=True, side_effect=getattr(Fetcher, name))


@pytest.mark.parametrize("routing", [700, 1 << 20], ids=["part", "resident"])
@pytest.mark.parametrize("content", [0, 500, 9000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["shared", "separate", "wide"])
def test_what_is_fetched_is_what_was_written(layout: KVLayout, routing: int, content: int) -> None:
    budgets = Budgets(routing, content, slab_bytes=300)
    world = filled(layout, budgets)
    with world.pager.lease(key(1), len(TOKENS), 0) as view, spy("__call__") as launched:
        for picks in ([0, 3], [0, 3], [5, 1], [2], list(range(10))):
            check_layers(view, world, picks)
        world.check(view, key(1), len(TOKENS))
        world.pager.check_integrity()
    assert launched.call_count or content <= 500
    assert not launched.call_count or content
    assert world.pager.residency().content_bytes <= content
    assert world.pager.evict(TENANT) > 0 or not routing + content
    assert world.pager._content._pool is not None
    assert not any(arena.memory.any() for arena in world.pager._content._pool._arenas)


@pytest.mark.parametrize(
    "storing",
    [KeyStorage(), KeyStorage(KeyFormat.INT8, 8), KeyStorage(KeyFormat.INT4, 8, exact=True)],
    ids=["float", "int8", "two-stage"],
)
def test_content_is_exact_however_coarse_the_keys_are(storing: KeyStorage) -> None:
    world = filled(SHARED, Budgets(1 << 22, 1 << 20), storing)
    with world.pager.lease(key(1), len(TOKENS), 0) as view:
        for picks in ([0, 3], [9, 5, 1]):
            check_layers(view, world, picks)
            check_layers(view, world, picks)


def test_layers_of_the_same_documents_are_looked_up_once() -> None:
    """Carried as they come from the store, then looked up, then brought for all layers at a time;
    until something is dropped."""
    world = filled(SEPARATE, Budgets(1 << 20, 3 * SEPARATE.block_bytes(200)))
    with world.pager.lease(key(1), len(TOKENS), 0) as view:
        with spy("select") as selected, spy("bring") as brought:
            for _ in range(4):
                check_layers(view, world, [0, 2])
            assert (selected.call_count, brought.call_count) == (1, 1 + 3)
            check_layers(view, world, [5, 6, 7, 8, 9])
            check_layers(view, world, [0, 2])
            assert selected.call_count == 3
        world.write(key(2), range(1, 11), 200)
        before = world.pager._content.drops
        with world.pager.lease(key(2), 10, 0) as other:
            other.content(0, list(range(10)))
        assert world.pager._content.drops > before
        check_layers(view, world, [0, 2])


def test_what_is_brought_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes, and by the layers there are; one layer is brought whatever it takes."""
    world = filled(SHARED, Budgets(1 << 20, 1 << 20))
    rows = 2 * sum(SHARED.chunks(TOKENS[pick]) for pick in (0, 3))
    with world.pager.lease(key(1), len(TOKENS), 0) as view, spy("bring") as brought:
        check_layers(view, world, [0, 3])
        for most, expected in ((0, [(0, 1), (1, 1), (2, 1)]), (2, [(0, 2), (2, 1)]), (9, [(0, 3)])):
            monkeypatch.setattr(fetching, "_AHEAD_BYTES", most * rows * 32)
            brought.reset_mock()
            check_layers(view, world, [0, 3])
            assert [call.args[2:] for call in brought.call_args_list] == expected
    assert view._selection is None


def test_rows_of_odd_bytes_are_carried() -> None:
    with pytest.raises(ValueError, match="6 bytes"):
        Fetcher(CPU, ODD)
    assert Fetcher.of(CPU, SEPARATE) is None, "a CPU reads what lies in RAM"


def test_the_kernel_is_looked_at_before_it_is_used() -> None:
    fetcher, rows = Fetcher(CPU, SEPARATE), Fetcher.rows
    fetcher.check()

    def swapped(self: Fetcher, addresses_n: _Numbers, chunks_n: _Numbers) -> _Numbers:
        return rows(self, addresses_n, chunks_n)[::-1].copy()

    with (
        patch.object(Fetcher, "rows", swapped),
        pytest.raises(RuntimeError, match="other bytes"),
    ):
        fetcher.check()
