"""Memories, forks and forks of forks on LMDB, beside an oracle that shares nothing it can hide."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.lmdb_env import MapLimits
from storage.lmdb_store import LmdbOptions, LmdbStore
from storage.memory_store import MemoryStore
from storage.store import MemoryUid, TenantStore
from tests.support.blocks import SHARED, encoding_id, make_block, make_document, memory_uid
from tests.support.keys import tenant_keys

ONE = encoding_id(1)
DATA = st.data()


class Forks(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.oracle: TenantStore = MemoryStore()
        self.store: TenantStore = self.open()
        #: The highest number given out, by memory.
        self.last = {memory_uid(1): 0}
        self.made = 1

    def open(self) -> LmdbStore:
        return LmdbStore(self.folder / "t", LmdbOptions(MapLimits(start_bytes=32 * 1024)))

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def memory(self, data: st.DataObject) -> MemoryUid:
        return data.draw(st.sampled_from(sorted(self.last)))

    def some(self, data: st.DataObject, memory: MemoryUid) -> list[int]:
        return data.draw(st.lists(st.integers(1, self.last[memory] + 1), unique=True, max_size=5))

    @precondition(lambda self: self.last)
    @rule(data=DATA, count=st.integers(1, 4), encode=st.booleans())
    def append(self, data: st.DataObject, count: int, encode: bool) -> None:
        memory = self.memory(data)
        numbers = range(self.last[memory] + 1, self.last[memory] + 1 + count)
        self.last[memory] += count
        for store in (self.store, self.oracle):
            store.put_documents(memory, [make_document(n, f"{memory[-1]}:{n}") for n in numbers])
        if encode:
            self.encode_all(memory)

    @precondition(lambda self: self.last)
    @rule(data=DATA)
    def encode(self, data: st.DataObject) -> None:
        self.encode_all(self.memory(data))

    def encode_all(self, memory: MemoryUid) -> None:
        """What waits, as a pipeline does: where there is a block, none is made."""
        for store in (self.store, self.oracle):
            waiting = set(store.document_numbers(memory)) - set(store.block_numbers(memory, ONE))
            blocks = [make_block(SHARED, n, seed=memory[-1]) for n in sorted(waiting)]
            store.put_blocks(memory, ONE, SHARED, blocks)

    @precondition(lambda self: self.last and self.made < 12)
    @rule(data=DATA, again=st.integers(1, 2))
    def fork(self, data: st.DataObject, again: int) -> None:
        for _ in range(again):
            memory = self.memory(data)
            last = data.draw(st.integers(0, self.last[memory]) | st.just(self.last[memory]))
            without = data.draw(st.just([]) | st.just(self.some(data, memory)))
            self.made += 1
            # Before and behind its parent in the order of keys.
            child = memory_uid(self.made * 37 % 101)
            self.last[child] = last
            for store in (self.store, self.oracle):
                store.fork(memory, child, last, without)

    @precondition(lambda self: self.last)
    @rule(data=DATA)
    def delete_documents(self, data: st.DataObject) -> None:
        memory = self.memory(data)
        numbers = self.some(data, memory)
        gone = [s.delete_documents(memory, numbers) for s in (self.store, self.oracle)]
        assert gone[0] == gone[1]

    @precondition(lambda self: self.last)
    @rule(data=DATA)
    def delete_blocks(self, data: st.DataObject) -> None:
        memory = self.memory(data)
        shown = self.oracle.document_numbers(memory)
        numbers = [number for number in self.some(data, memory) if number in shown]
        for store in (self.store, self.oracle):
            store.delete_blocks(memory, ONE, numbers)

    @precondition(lambda self: self.last)
    @rule(data=DATA)
    def delete_memory(self, data: st.DataObject) -> None:
        memory = self.memory(data)
        del self.last[memory]
        gone = [s.delete_memory(memory) for s in (self.store, self.oracle)]
        assert gone[0] == gone[1]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    @invariant()
    def the_same_is_shown(self) -> None:
        for memory in self.last:
            documents = list(self.oracle.iter_documents(memory))
            assert list(self.store.iter_documents(memory)) == documents
            numbers = self.oracle.block_numbers(memory, ONE)
            assert self.store.block_numbers(memory, ONE) == numbers
            assert [p.number for p in self.store.iter_content(memory, ONE, SHARED)] == numbers
            packed = self.store.load_routing(memory, ONE, SHARED, 2, 5)
            assert packed.numbers_N.tolist() == [n for n in numbers if 2 <= n <= 5]

    @invariant()
    def nothing_is_wrong_or_left(self) -> None:
        assert list(self.store.check()) == []
        if not self.last:
            assert isinstance(self.store, LmdbStore)
            assert list(self.store.iter_raw()) == []


class EncryptedForks(Forks):
    """Deletions destroy keys, in one memory at a time."""

    def open(self) -> LmdbStore:
        options = LmdbOptions(MapLimits(start_bytes=32 * 1024))
        return LmdbStore(self.folder / "t", options, tenant_keys(self.folder))


TestForks, TestEncryptedForks = Forks.TestCase, EncryptedForks.TestCase
TestForks.settings = TestEncryptedForks.settings = settings(
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
