"""A device that has less room than the pager's budget says."""

from __future__ import annotations

import logging
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import psutil

from model_adapter.pager import Budgets
from storage.layout import KVLayout
from tests.support.pages import World, document_bytes, key

#: Routing keys of such a document take 40 MiB: more than an allocator keeps at hand.
LARGE = KVLayout((1, 2), 64, 10240, 1, "bf16", separate_routing_keys=False)
TOKENS = 16
_MARGIN = 16 * 2**20


def test_a_memory_that_the_device_has_no_room_for_is_streamed() -> None:
    """In a process of its own: what others freed in this one would be room."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        warnings = fresh.submit(_page_in_without_room).result()
    assert any("no room for" in warning for warning in warnings)


def _page_in_without_room() -> list[str]:
    """Raises AssertionError; returns what was logged."""
    warnings: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return True

    logging.getLogger("model_adapter.pager").addFilter(keep)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    world = World(LARGE, Budgets(routing_bytes=2**40, content_bytes=0))
    world.write(key(1), [1], TOKENS)
    asked: list[bool] = []

    def unwanted() -> bool:
        """Asked at first, again when what is to be held has been read, and before each slab."""
        if len(asked) == 1:
            now = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (now + _MARGIN, limits[1]))
        asked.append(True)
        return False

    view = world.pager.lease(key(1), 1, 0, unwanted)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    with view:
        assert world.pager.residency().routing_bytes == 0
        world.pager.check_integrity()
        world.check(view, key(1), 1)
    with world.pager.lease(key(1), 1, 0) as view:
        assert world.pager.residency().routing_bytes == document_bytes(LARGE, TOKENS)
        assert view.numbers_N.tolist() == [1]
    world.pager.check_integrity()
    return warnings
