"""A worker's keys: held as long as the memory is, the newest of them, and nothing opens without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_adapter.errors import CorruptRecordError, MemoryChangedError
from model_adapter.keys import HeldKeys
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from storage.crypto import MemorySecret, TenantKeys
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.store import KeyMissingError
from tests.support.blocks import SEPARATE, make_block, make_document
from tests.support.keys import tenant_keys
from tests.support.pages import ENCODING, TENANT, check_view, key, text, uid

NAME, OTHER = key(1), key(2)


class Bench:
    """An encrypted store, and a pager that gets its keys with each lease alone."""

    def __init__(self, folder: Path) -> None:
        self.keeper: TenantKeys = tenant_keys(folder, TENANT)
        store = LmdbStore(folder / "store", keys=self.keeper)
        for name in (NAME, OTHER):
            blocks = [make_block(SEPARATE, number) for number in range(1, 7)]
            store.put_documents(
                uid(name), [make_document(b.number, text(b.number)) for b in blocks]
            )
            store.put_blocks(uid(name), ENCODING, SEPARATE, blocks)
        store.close()
        self.path = folder / "store"
        self.held = HeldKeys()
        readers = Readers(lambda tenant: LmdbReader(self.path, self.held.tenant(tenant)))
        budgets, cpu = Budgets(1 << 20, 1 << 20), torch.device("cpu")
        self.pager = Pager(SEPARATE, ENCODING, readers, budgets, cpu, self.held)

    def secret(self) -> MemorySecret:
        """A copy, as it comes with a question."""
        own = self.keeper.of(uid(NAME))
        return MemorySecret(own.key, own.generation)

    def delete(self, *numbers: int) -> None:
        """As memsvc does: the store first, then the worker is told."""
        self.pager.evict(TENANT)
        store = LmdbStore(self.path, keys=self.keeper)
        store.delete_documents(uid(NAME), numbers)
        store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_key_is_held_as_long_as_its_memory_and_overwritten_then(bench: Bench) -> None:
    secret = bench.secret()
    lying = secret.key
    with bench.pager.lease(NAME, 6, 0, secret=secret) as view:
        check_view(view, [make_block(SEPARATE, number) for number in range(1, 7)], SEPARATE)
    bench.pager.check_integrity()
    assert bench.held.names() == {NAME}
    del secret
    assert any(lying)
    bench.pager.evict(TENANT, NAME.memory)
    assert bench.held.names() == set()
    bench.pager.check_integrity()
    assert lying == bytes(32), "the key's own bytes are zeros"


def test_without_its_key_nothing_opens(bench: Bench) -> None:
    with pytest.raises(MemoryChangedError):
        bench.pager.lease(NAME, 6, 0)
    wrong = MemorySecret(b"w" * 32, 0)
    with pytest.raises(CorruptRecordError):
        bench.pager.lease(NAME, 6, 0, secret=wrong)
    with pytest.raises(CorruptRecordError):
        bench.pager.lease(OTHER, 6, 0, secret=bench.secret())
    assert bench.held.names() == set(), "what failed is not kept"
    bench.pager.check_integrity()
    with bench.pager.lease(NAME, 6, 0, secret=bench.secret()) as view:
        assert view.text(3).endswith("document 3")


def test_after_a_deletion_the_new_key_opens_what_is_left(bench: Bench) -> None:
    old = bench.secret()
    bench.pager.lease(NAME, 6, 0, secret=bench.secret()).release()
    bench.delete(2, 5)
    assert bench.secret().generation == 1
    left = [make_block(SEPARATE, number) for number in (1, 3, 4, 6)]
    with bench.pager.lease(NAME, 6, 1, secret=bench.secret()) as view:
        check_view(view, left, SEPARATE)
        # A question that was asked before the deletion brings the old key along.
        with bench.pager.lease(NAME, 6, 1, secret=old) as late:
            check_view(late, left, SEPARATE)
    assert bench.held.get(NAME) is not old, "the newest is kept"


def test_tenants_and_memories_do_not_share_keys(bench: Bench) -> None:
    bench.pager.lease(NAME, 6, 0, secret=bench.secret()).release()
    source = bench.held.tenant("b0" * 16)
    with pytest.raises(KeyMissingError):
        source.of(uid(NAME))
    with pytest.raises(KeyMissingError):
        bench.held.tenant(TENANT).of(uid(OTHER))
