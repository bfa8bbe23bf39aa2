"""The contract, on the oracle and on LMDB: under each lossless codec, and encrypted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.block_records import BlockCodecs
from storage.codecs import Codec
from storage.lmdb_store import LmdbOptions, LmdbStore
from storage.memory_store import MemoryStore
from storage.store import TenantStore
from tests.storage.contract import StoreContract
from tests.support.keys import tenant_keys


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> TenantStore:
        return MemoryStore()


class TestLmdbStore(StoreContract):
    @pytest.fixture(params=[Codec.RAW, Codec.ZSTD], ids=["raw", "zstd"])
    def store(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TenantStore]:
        codecs = BlockCodecs(routing=request.param, content=request.param)
        store = LmdbStore(tmp_path / "tenant", LmdbOptions(codecs=codecs))
        yield store
        store.close()


class TestEncryptedStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[TenantStore]:
        store = LmdbStore(tmp_path / "tenant", keys=tenant_keys(tmp_path))
        yield store
        store.close()
