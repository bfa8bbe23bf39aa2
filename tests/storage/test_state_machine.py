"""LMDB and the oracle, side by side, through any order of writes, reopenings and readers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.block_records import BlockCodecs
from storage.codecs import Codec
from storage.layout import KVLayout
from storage.lmdb_env import MapLimits
from storage.lmdb_store import LmdbOptions, LmdbStore
from storage.memory_store import MemoryStore
from storage.store import EncodingId, ForeignRecordError, MemoryUid, StoredDocument, TenantStore
from tests.support.blocks import (
    LAYOUTS,
    documents,
    encoding_id,
    make_block,
    memory_uid,
    same_bits,
)
from tests.support.keys import key_path, tenant_keys
from tests.support.store_process import ENCODING, MEMORY, Process

MEMORIES = st.integers(1, 3).map(memory_uid)
ENCODINGS = st.integers(1, 2).map(encoding_id)
NUMBER = st.integers(1, 12) | st.sampled_from([255, 256, 2**40])
NUMBERS = st.lists(NUMBER, max_size=5)
ENDS = st.tuples(st.integers(0, 300), st.none() | st.integers(0, 300))
LIMITS = MapLimits(start_bytes=32 * 1024)


class Stores(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "tenant"
        self.codec = Codec.RAW
        self.oracle: TenantStore = MemoryStore()
        self.store: TenantStore = self.open()
        self.process: Process | None = None
        #: Memories that were written to and not deleted.
        self.written: set[MemoryUid] = set()

    def open(self) -> LmdbStore:
        return LmdbStore(self.path, LmdbOptions(LIMITS, BlockCodecs(self.codec, self.codec)))

    def elsewhere(self) -> Process:
        """Another process that reads the store."""
        return Process("read", self.path)

    def teardown(self) -> None:
        if self.process:
            self.process.kill()
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(memory=MEMORIES, held=st.lists(documents(NUMBER), max_size=4))
    def put_documents(self, memory: MemoryUid, held: Sequence[StoredDocument]) -> None:
        self.store.put_documents(memory, held)
        self.oracle.put_documents(memory, held)
        self.written.add(memory)

    @rule(
        memory=MEMORIES,
        encoding=ENCODINGS,
        layout=st.sampled_from(LAYOUTS),
        numbers=NUMBERS,
        tokens=st.integers(1, 300),
        seed=st.integers(0, 9),
    )
    def put_blocks(
        self,
        memory: MemoryUid,
        encoding: EncodingId,
        layout: KVLayout,
        numbers: Sequence[int],
        tokens: int,
        seed: int,
    ) -> None:
        blocks = [make_block(layout, number, tokens, seed) for number in numbers]
        refused = [False, False]
        for index, store in enumerate((self.store, self.oracle)):
            try:
                store.put_blocks(memory, encoding, layout, blocks)
            except ForeignRecordError:
                refused[index] = True
        assert refused[0] == refused[1]
        self.written.add(memory)

    @rule(memory=MEMORIES, numbers=NUMBERS)
    def delete_documents(self, memory: MemoryUid, numbers: Sequence[int]) -> None:
        self.store.delete_documents(memory, numbers)
        self.oracle.delete_documents(memory, numbers)

    @rule(memory=MEMORIES, encoding=ENCODINGS, numbers=NUMBERS)
    def delete_blocks(
        self, memory: MemoryUid, encoding: EncodingId, numbers: Sequence[int]
    ) -> None:
        self.store.delete_blocks(memory, encoding, numbers)
        self.oracle.delete_blocks(memory, encoding, numbers)

    @rule(memory=MEMORIES, encoding=ENCODINGS)
    def delete_encoding(self, memory: MemoryUid, encoding: EncodingId) -> None:
        self.store.delete_encoding(memory, encoding)
        self.oracle.delete_encoding(memory, encoding)

    @rule(memory=MEMORIES)
    def delete_memory(self, memory: MemoryUid) -> None:
        self.store.delete_memory(memory)
        self.oracle.delete_memory(memory)
        self.written.discard(memory)

    @rule(codec=st.sampled_from([Codec.RAW, Codec.ZSTD]))
    def reopen(self, codec: Codec) -> None:
        self.store.close()
        self.codec = codec
        self.store = self.open()

    @rule(memory=MEMORIES, ends=ENDS)
    def read_documents(self, memory: MemoryUid, ends: tuple[int, int | None]) -> None:
        found = list(self.store.iter_documents(memory, *ends))
        assert found == list(self.oracle.iter_documents(memory, *ends))

    @rule(memory=MEMORIES, encoding=ENCODINGS, ends=ENDS)
    def read_blocks(
        self, memory: MemoryUid, encoding: EncodingId, ends: tuple[int, int | None]
    ) -> None:
        numbers = self.oracle.block_numbers(memory, encoding, *ends)
        assert self.store.block_numbers(memory, encoding, *ends) == numbers
        if encoding not in self.oracle.encodings(memory):
            return
        layout = self.oracle.encoding_layout(memory, encoding)
        assert self.store.encoding_layout(memory, encoding) == layout
        packed = [
            s.load_routing(memory, encoding, layout, *ends) for s in (self.store, self.oracle)
        ]
        assert np.array_equal(packed[0].numbers_N, packed[1].numbers_N)
        assert np.array_equal(packed[0].tokens_N, packed[1].tokens_N)
        assert same_bits(packed[0].routing_key_LCE, packed[1].routing_key_LCE)
        for number in numbers:
            content = [
                s.get_content(memory, encoding, layout, number) for s in (self.store, self.oracle)
            ]
            assert same_bits(content[0].key_LCE, content[1].key_LCE)
            assert same_bits(content[0].value_LCE, content[1].value_LCE)

    @precondition(lambda self: LAYOUTS[0] in self.layouts())
    @rule()
    def read_elsewhere(self) -> None:
        """A reader in another process, kept open through later writes."""
        if self.process is None:
            self.process = self.elsewhere()
            assert self.process.read() == "ready"
        seen = json.loads(self.process.ask())
        assert seen["documents"] == self.oracle.document_numbers(MEMORY)
        assert seen["blocks"] == self.oracle.block_numbers(MEMORY, ENCODING)
        assert seen["problems"] == [finding.problem for finding in self.oracle.check()]

    def layouts(self) -> list[KVLayout]:
        if ENCODING not in self.oracle.encodings(MEMORY):
            return []
        return [self.oracle.encoding_layout(MEMORY, ENCODING)]

    def may_be_hollow(self) -> set[MemoryUid]:
        """Memories of which a record may be there, although no document and no block is."""
        return set()

    @invariant()
    def the_same_is_there(self) -> None:
        memories = self.oracle.memories()
        hollow = [memory for memory in self.store.memories() if memory not in memories]
        assert set(hollow) <= self.may_be_hollow()
        assert self.store.memories() == sorted([*memories, *hollow])
        for memory in (*memories, *hollow):
            assert self.store.document_numbers(memory) == self.oracle.document_numbers(memory)
            assert self.store.encodings(memory) == self.oracle.encodings(memory)

    @invariant()
    def the_same_is_wrong(self) -> None:
        """Only blocks without documents, which the rules above make at will."""
        assert [(f.key, f.problem) for f in self.store.check()] == [
            (f.key, f.problem) for f in self.oracle.check()
        ]


class EncryptedStores(Stores):
    """Deletions destroy keys, and numbers get new ones."""

    def open(self) -> LmdbStore:
        codecs = BlockCodecs(self.codec, self.codec)
        return LmdbStore(self.path, LmdbOptions(LIMITS, codecs), tenant_keys(self.folder))

    def elsewhere(self) -> Process:
        return Process("read", self.path, str(key_path(self.folder)))

    def may_be_hollow(self) -> set[MemoryUid]:
        """Its keys stay until the memory itself is deleted."""
        return self.written


SETTINGS = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStores, TestEncryptedStores = Stores.TestCase, EncryptedStores.TestCase
TestStores.settings = TestEncryptedStores.settings = SETTINGS
