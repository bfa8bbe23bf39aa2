"""Stores, pagers and what a lease should show, for tests of the worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import lmdb
import numpy as np
import torch

from model_adapter.engine import MemoryView
from model_adapter.fetching import Fetcher
from model_adapter.msa.kernels import KeyStorage
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from model_adapter.residency import MemoryKey
from model_adapter.tensors import as_tensor
from storage.documents import render
from storage.layout import Bits, KVBlock, KVLayout
from storage.lmdb_store import LmdbStore
from storage.memory_store import MemoryStore
from storage.store import BlockReader, EncodingId, MemoryUid, StoreNotFoundError, TenantStore
from tests.support.blocks import SEPARATE, encoding_id, make_block, make_document

TENANT = "a0" * 16
OTHER_TENANT = "b0" * 16
ENCODING = encoding_id(7)


def key(memory: int, tenant: str = TENANT) -> MemoryKey:
    """Names a memory by a small number."""
    return MemoryKey(tenant, f"{memory:032x}")


def uid(name: MemoryKey) -> MemoryUid:
    """As the store names it."""
    return MemoryUid(bytes.fromhex(name.memory))


def document_bytes(layout: KVLayout, tokens: int) -> int:
    """Routing bytes of one document."""
    return layout.block_bytes(tokens) // layout.kinds()


class _Shared:
    """A store lent to Readers, which may close what it is lent."""

    def __init__(self, store: TenantStore) -> None:
        self._store = store

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


@dataclass
class World:
    """Stores of tenants, a pager over them, and what was written."""

    layout: KVLayout = SEPARATE
    budgets: Budgets = field(default_factory=lambda: Budgets(1 << 20, 1 << 20))
    encoding: EncodingId = ENCODING
    stores: dict[str, TenantStore] = field(default_factory=dict)
    blocks: dict[MemoryKey, dict[int, KVBlock]] = field(default_factory=dict)
    pager: Pager = field(init=False)

    def __post_init__(self) -> None:
        self.pager = self.new_pager(self.budgets)

    def new_pager(
        self,
        budgets: Budgets,
        storing: KeyStorage | None = None,
        fetcher: Fetcher | None = None,
    ) -> Pager:
        """Another pager over the same stores."""
        place = self.layout, self.encoding, Readers(self._open), budgets, torch.device("cpu")
        return Pager(*place, storing=storing, fetcher=fetcher)

    def _open(self, tenant: str) -> BlockReader:
        if tenant not in self.stores:
            raise StoreNotFoundError(tenant)
        return cast(BlockReader, _Shared(self.stores[tenant]))

    def store(self, tenant: str = TENANT) -> TenantStore:
        """Made when it isn't there."""
        return self.stores.setdefault(tenant, MemoryStore())

    def write(self, name: MemoryKey, numbers: Iterable[int], tokens: int = 5) -> None:
        """Documents and their blocks."""
        blocks = [make_block(self.layout, number, tokens) for number in numbers]
        self.blocks.setdefault(name, {}).update({block.number: block for block in blocks})
        store = self.store(name.tenant)
        store.put_documents(uid(name), [make_document(b.number, text(b.number)) for b in blocks])
        store.put_blocks(uid(name), self.encoding, self.layout, blocks)

    def delete(self, name: MemoryKey, numbers: Iterable[int]) -> None:
        """Documents and their blocks, in the store alone."""
        numbers = list(numbers)
        for number in numbers:
            self.blocks[name].pop(number, None)
        self.store(name.tenant).delete_documents(uid(name), numbers)

    def check(self, view: MemoryView, name: MemoryKey, last: int) -> None:
        """Compares everything a view shows with what was written, by brute force."""
        written = self.blocks.get(name, {})
        expected = [written[number] for number in sorted(written) if number <= last]
        check_view(view, expected, self.layout)


def text(number: int) -> str:
    """Of a written document."""
    return f"this is document {number}"


def flip(world: World, folder: Path, record: bytes) -> None:
    """Changes one byte in the middle of a stored value of TENANT's LMDB store in a folder."""
    world.stores[TENANT].close()
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        value = bytearray(transaction.get(record) or b"")
        value[len(value) // 2] ^= 0x10
        transaction.put(record, bytes(value))
    world.stores[TENANT] = LmdbStore(folder)
    # The pager's handle was the closed one.
    world.pager._readers.close()


def bits(tensor: torch.Tensor) -> np.ndarray:
    """As bytes, so that bf16 compares bit for bit."""
    return tensor.contiguous().view(torch.uint8).numpy()


def check_view(view: MemoryView, expected: list[KVBlock], layout: KVLayout) -> None:
    """Raises AssertionError unless the view shows exactly these blocks."""
    chunks = [layout.chunks(block.tokens) for block in expected]
    assert view.numbers_N.tolist() == [block.number for block in expected]
    assert view.chunk_offsets_N1.tolist() == np.cumsum([0, *chunks]).tolist()
    picks = list(range(len(expected)))[::-2]  # Not in document order, not all.
    for layer in range(len(layout.routed_layers)):
        seen = 0
        for first, keys_CE in view.routing_keys(layer):
            assert first == seen, "slabs cover all chunks in order"
            assert first in view.chunk_offsets_N1, "slabs start at document boundaries"
            end = first + keys_CE.shape[0]
            assert (bits(keys_CE) == joined(expected, "routing", layer, layout)[first:end]).all()
            seen = end
        assert seen == sum(chunks)
        if picks:
            chosen = [expected[n] for n in picks]
            key_CE, value_CE = view.content(layer, picks)
            assert (bits(key_CE) == joined(chosen, "key", layer, layout)).all()
            assert (bits(value_CE) == joined(chosen, "value", layer, layout)).all()
    for block in expected[:3]:
        assert view.text(block.number) == render(
            make_document(block.number, text(block.number)).source
        )


def joined(blocks: list[KVBlock], kind: str, layer: int, layout: KVLayout) -> np.ndarray:
    """One layer's rows of one kind as bytes."""

    def array(block: KVBlock) -> Bits:
        if kind == "value":
            return block.value_LCE
        if kind == "key" and block.key_LCE is not None:
            return block.key_LCE
        return block.routing_key_LCE

    rows = [as_tensor(array(block), layout)[layer] for block in blocks]
    return bits(torch.cat(rows))
