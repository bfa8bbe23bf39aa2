"""Every order of writing, leasing, reading, deleting and evicting keeps the pager whole."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from model_adapter.lease import Lease
from model_adapter.pager import Budgets
from model_adapter.residency import MemoryKey
from storage.layout import KVBlock, KVLayout
from tests.support.blocks import LAYOUTS
from tests.support.pages import OTHER_TENANT, TENANT, World, check_view, document_bytes, key

NAMES = [key(1), key(2), key(3), key(1, OTHER_TENANT)]
names = st.sampled_from(NAMES)


@dataclass
class Open:
    """A lease and what it has to show; a view whose documents were deleted shows anything."""

    name: MemoryKey
    lease: Lease
    expected: list[KVBlock]
    spoilt: bool = False


class PagerMachine(RuleBasedStateMachine):
    leases = Bundle("leases")

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        routing=st.sampled_from([0, 20, 60, 1000]),
        content=st.sampled_from([0, 2, 1000]),
    )
    def begin(self, layout: KVLayout, routing: int, content: int) -> None:
        one = document_bytes(layout, 5)
        self.world = World(layout, Budgets(routing * one, content * one, slab_bytes=3 * one))
        self.last = dict.fromkeys(NAMES, 0)
        self.epochs = dict.fromkeys(NAMES, 0)
        self.open: list[Open] = []

    @rule(
        name=names, count=st.integers(1, 12), tokens=st.sampled_from([1, 5, 130]), gap=st.booleans()
    )
    def write(self, name: MemoryKey, count: int, tokens: int, gap: bool) -> None:
        first = self.last[name] + 1 + gap  # A quarantined document leaves a gap.
        self.last[name] = first + count - 1
        self.world.write(name, range(first, first + count), tokens)

    @rule(name=names, data=st.data())
    def delete(self, name: MemoryKey, data: st.DataObject) -> None:
        written = sorted(self.world.blocks.get(name, {}))
        if written:
            chosen = data.draw(st.sets(st.sampled_from(written), min_size=1))
            self.world.delete(name, chosen)
            self.epochs[name] += 1
            for view in self.open:
                view.spoilt |= view.name == name

    @rule(target=leases, name=names, share=st.sampled_from([0.0, 0.5, 1.0]))
    def lease(self, name: MemoryKey, share: float) -> object:
        if sum(not view.spoilt for view in self.open) > 6:
            return multiple()
        last = round(self.last[name] * share)
        written = self.world.blocks.get(name, {})
        expected = [written[number] for number in sorted(written) if number <= last]
        view = Open(name, self.world.pager.lease(name, last, self.epochs[name]), expected)
        self.open.append(view)
        return view

    @rule(view=leases)
    def read(self, view: Open) -> None:
        if not view.spoilt:
            check_view(view.lease, view.expected, self.world.layout)

    @rule(view=consumes(leases))
    def release(self, view: Open) -> None:
        self.open.remove(view)
        view.lease.release()

    @rule(name=names, whole_tenant=st.booleans())
    def evict(self, name: MemoryKey, whole_tenant: bool) -> None:
        memory = "" if whole_tenant else name.memory
        if not any(view.name.within(name.tenant, memory) for view in self.open):
            self.world.pager.evict(name.tenant, memory, timeout_s=0)

    @invariant()
    def whole(self) -> None:
        self.world.pager.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for view in self.open:
            view.lease.release()
        for tenant in (TENANT, OTHER_TENANT):
            self.world.pager.evict(tenant, timeout_s=0)
        held = self.world.pager.residency()
        assert (held.routing_bytes, held.content_bytes, held.memories) == (0, 0, 0)


TestPagerMachine = PagerMachine.TestCase
TestPagerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
