from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from memsvc.keys import Keys
from memsvc.stores import Stores, lmdb_opener
from storage.documents import TextSource
from storage.paths import DataFolder
from storage.store import MemoryUid, StorageError, StoredDocument, TenantRemovedError, TenantStore
from tests.support.keys import ROOT

MEMORY = MemoryUid(bytes(16))


def put(store: TenantStore, number: int) -> None:
    store.put_documents(MEMORY, [StoredDocument(number, 1, 0, TextSource("text"))])


def numbers(store: TenantStore) -> list[int]:
    return store.document_numbers(MEMORY)


def make(tmp_path: Path, open_environments: int) -> Stores:
    folder = DataFolder(tmp_path)
    opener = lmdb_opener(8 * 1024 * 1024, Keys(folder, ROOT))
    return Stores(folder, open_environments, 2, opener)


async def test_few_environments_stay_open_and_all_keep_their_data(tmp_path: Path) -> None:
    stores = make(tmp_path, 3)
    tenants = [f"{index:032x}" for index in range(9)]
    for round_ in range(1, 3):
        await asyncio.gather(*(stores.run(tenant, put, round_) for tenant in tenants))
    for tenant in tenants:
        assert await stores.read(tenant, numbers) == [1, 2]
        assert stores.open_count <= 3
    await stores.close()
    assert stores.open_count == 0


async def test_writers_of_a_tenant_take_turns_and_tenants_do_not(tmp_path: Path) -> None:
    stores = make(tmp_path, 4)
    inside: dict[str, int] = {"a" * 32: 0, "b" * 32: 0}
    most: dict[str, int] = dict.fromkeys(inside, 0)
    together = threading.Barrier(2, timeout=5)

    def work(_: TenantStore, tenant: str) -> None:
        inside[tenant] += 1
        most[tenant] = max(most[tenant], inside[tenant])
        together.wait()
        inside[tenant] -= 1

    await asyncio.gather(*(stores.run(tenant, work, tenant) for tenant in inside for _ in range(3)))
    assert set(most.values()) == {1}
    await stores.close()


async def test_a_cancelled_caller_does_not_free_what_its_thread_uses(tmp_path: Path) -> None:
    stores = make(tmp_path, 1)
    began = threading.Event()

    def slow(store: TenantStore) -> None:
        began.set()
        time.sleep(0.2)
        put(store, 7)

    task = asyncio.create_task(stores.run("a" * 32, slow))
    await asyncio.to_thread(began.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Opening another tenant must not close the first under its thread.
    await stores.run("b" * 32, put, 1)
    assert await stores.run("a" * 32, numbers) == [7]
    await stores.close()


async def test_removing_a_tenant_deletes_its_files(tmp_path: Path) -> None:
    stores = make(tmp_path, 2)
    await stores.run("a" * 32, put, 1)
    path = DataFolder(tmp_path).tenant("a" * 32)
    assert path.exists()
    await stores.remove("a" * 32)
    assert not path.exists()
    assert await stores.read("b" * 32, numbers) == []
    await stores.close()


async def test_an_environment_that_cannot_be_opened_fails_and_may_be_tried_again(
    tmp_path: Path,
) -> None:
    stores = make(tmp_path, 2)
    path = DataFolder(tmp_path).tenant("a" * 32)
    path.parent.mkdir()
    path.write_text("in the way")
    for _ in range(2):
        with pytest.raises((StorageError, OSError)):
            await stores.run("a" * 32, put, 1)
    path.unlink()
    await stores.run("a" * 32, put, 1)
    await stores.close()


async def test_what_was_removed_is_not_made_again(tmp_path: Path) -> None:
    """By a call that was under way when its tenant was deleted."""
    folder = DataFolder(tmp_path)
    keys = Keys(folder, ROOT)
    stores = Stores(folder, 2, 2, lmdb_opener(8 * 1024 * 1024, keys))
    tenant = "0a" * 16
    await stores.run(tenant, put, 1)
    held = keys.tenant(tenant)
    assert held is not None
    for _ in range(2):
        await stores.remove(tenant)
        keys.destroy_tenant(tenant)
    for use in (stores.run(tenant, put, 2), stores.read(tenant, numbers)):
        with pytest.raises(TenantRemovedError):
            await use
    with pytest.raises(TenantRemovedError):
        keys.tenant(tenant)
    with pytest.raises(TenantRemovedError):
        held.create(MemoryUid(b"m" * 16))
    assert not folder.tenant(tenant).exists()
    assert not folder.keys(tenant).exists()
    await stores.close()


async def test_what_cannot_be_removed_is_told_of(tmp_path: Path) -> None:
    stores, tenant = make(tmp_path, 2), "a" * 32
    await stores.run(tenant, put, 1)
    path, moved = DataFolder(tmp_path).tenant(tenant), tmp_path / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(StorageError):
        await stores.remove(tenant)
    path.unlink()
    moved.rename(path)
    await stores.remove(tenant)
    assert not path.exists()
    await stores.remove(tenant)
    await stores.close()
