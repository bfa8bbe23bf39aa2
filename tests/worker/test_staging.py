"""The ring of buffers: what arrives late is what was handed over, and the ring is all there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.errors import InterruptedQueryError
from model_adapter.msa.kernels import KeyFormat, KeyStorage
from model_adapter.pager import Budgets
from model_adapter.residency import RoutingTable
from model_adapter.staging import Arrival, Staging
from storage.store import Room
from tests.support.blocks import SEPARATE, SHARED
from tests.support.pages import World, key

CPU = torch.device("cpu")


class LateLane:
    """Reads its buffers when it is waited for, and not before: a device that is slow."""

    def __init__(self) -> None:
        self.buffers = self.pending = self.most = 0

    def buffer(self, size: int) -> torch.Tensor:
        self.buffers += 1
        return torch.zeros(size, dtype=torch.uint8)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        self.pending += 1
        self.most = max(self.most, self.pending)

        def wait() -> None:
            target.copy_(source)
            self.pending -= 1

        return wait


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    buffers=st.integers(1, 4),
    room=st.sampled_from([16, 200, 1 << 12]),
)
def test_what_arrives_is_what_was_handed_over(sizes: list[int], buffers: int, room: int) -> None:
    lane = LateLane()
    staging = Staging(lane, room, buffers)
    source = torch.randn(2, sum(sizes), 6).bfloat16()
    target = torch.zeros_like(source)
    first = 0
    for size in sizes:
        handed = source[:, first : first + size].clone()
        staging.copy(target[:, first : first + size], handed)
        handed.zero_()  # the caller's again
        first += size
    staging.finish()
    assert torch.equal(target, source)
    assert lane.pending == 0 and lane.most <= buffers
    assert lane.buffers <= buffers, "a chunk fits a buffer here, or grows it once"


def test_nothing_waits_while_buffers_are_free() -> None:
    lane = LateLane()
    staging = Staging(lane, 1 << 10, 3)
    target, source = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    for _ in range(3):
        staging.copy(target, source)
    assert lane.pending == 3 and not target.any()
    staging.copy(target, source)
    assert lane.pending == 3 and target.all(), "the first had to arrive for its buffer"


def lent_tensor(staging: Staging, room: Room, values: int) -> torch.Tensor:
    """[2, values / 6, 3] bf16 where the ring, or new memory, has room for it."""
    memory = np.frombuffer(room(2 * values), np.int16)
    return torch.from_numpy(memory).view(torch.bfloat16).view(2, -1, 3)


def test_what_was_decoded_in_the_ring_goes_from_there() -> None:
    lane = LateLane()
    staging = Staging(lane, 1 << 10, 3)
    targets = [torch.zeros(2, 4, 3).bfloat16() for _ in range(7)]
    for number, target in enumerate(targets, 1):
        with staging.lent() as room:
            source = lent_tensor(staging, room, target.numel()).fill_(number)
            staging.copy(target, source)
            assert not target.any()
    staging.finish()
    assert all((target == number).all() for number, target in enumerate(targets, 1))
    assert lane.buffers == 3 and not lane.pending


def test_who_copies_does_not_wait_for_who_decodes() -> None:
    lane = LateLane()
    staging = Staging(lane, 1 << 10, 3)
    target = torch.zeros(2, 4, 3).bfloat16()
    with staging.lent() as one, staging.lent() as two, staging.lent() as three:
        sources = [lent_tensor(staging, room, target.numel()) for room in (one, two, three)]
        assert lane.buffers == 2, "the last buffer is for those that have none"
        for source in sources:
            staging.copy(target, source.fill_(5))
        staging.finish()
        assert (target == 5).all() and lane.buffers == 3
    with staging.lent() as room:
        large = lent_tensor(staging, room, 6000)
        assert large.nbytes > 1 << 10, "what fits no buffer is decoded elsewhere"
        there = torch.zeros_like(large)
        staging.copy(there, large.normal_())
        staging.finish()
        assert torch.equal(there, large)


def test_the_ring_forgets_what_was_in_it() -> None:
    lane = LateLane()
    staging = Staging(lane, 1 << 10, 2)
    target = torch.zeros(2, 32, 3).bfloat16()
    for size in (6, 60, 12):
        with staging.lent() as room:
            source = lent_tensor(staging, room, size).fill_(7)
            staging.copy(target[:, : size // 6], source)
    memory = [buffer.memory for buffer in staging._buffers]
    assert [int((kept != 0).sum()) > 0 for kept in memory] == [True, True]
    with staging.lent() as room:
        mine = lent_tensor(staging, room, 6).fill_(3)
        held = staging._buffers[1].memory
        assert held.data_ptr() == mine.data_ptr() and not held[12:].any(), "it held 60 before"
        staging.wipe()
        assert (mine == 3).all(), "lent, and its borrower's"
        assert not memory[0].any() and (target[:, :10] == 7).all()
    staging.wipe()
    assert not any(kept.any() for kept in memory)


def test_a_table_by_a_ring_holds_what_a_plain_one_does() -> None:
    generator = torch.Generator().manual_seed(2)
    for storing in (KeyStorage(), KeyStorage(KeyFormat.INT4, 8, exact=True)):
        plain = RoutingTable(SEPARATE, CPU, storing)
        ring = RoutingTable(SEPARATE, CPU, storing, Staging(LateLane(), 256))
        for number in range(1, 12):
            shape = (len(SEPARATE.routed_layers), 3, SEPARATE.width)
            keys_LCE = torch.randn(shape, generator=generator).bfloat16()
            for table in (plain, ring):
                if table.room < 3:
                    table.add_segment(table.comfortable(3))
                table.append([number], [3], keys_LCE)
        ring.settle()
        ends = [*(segment.first for segment in plain.segments[1:]), plain.index.chunks]
        for ours, theirs, end in zip(ring.segments, plain.segments, ends, strict=True):
            used = end - theirs.first
            for one, other in zip(ours.tensors(), theirs.tensors(), strict=True):
                assert torch.equal(one[:, :used], other[:, :used])


def test_a_lease_is_given_when_everything_has_arrived() -> None:
    world = World(SHARED, Budgets(1 << 20, 1 << 20, slab_bytes=300))
    lane = LateLane()
    world.pager._staging = Staging(lane, 128)
    world.write(key(1), range(1, 30), 9)
    with world.pager.lease(key(1), 12, 0) as view:
        assert lane.buffers and not lane.pending
        world.check(view, key(1), 12)
    asked = iter([False, False, True])
    with pytest.raises(InterruptedQueryError):
        world.pager.lease(key(1), 20, 0, unwanted=lambda: next(asked))
    assert not lane.pending, "what was brought before stays, and is there"
    with world.pager.lease(key(1), 29, 0) as view:
        world.check(view, key(1), 29)
    world.pager.check_integrity()
