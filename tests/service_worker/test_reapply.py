"""A backup that is older than a deletion brings back what was deleted; receipts delete it again."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from memsvc.auth import load_server_key
from memsvc.backup import back_up, begun
from memsvc.reapply import read_deletions
from memsvc.receipts import SEED_PURPOSE, Destroyed, ReceiptError, Receipts, public_key
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from storage.paths import DataFolder
from tests.support.keys import open_store
from tests.support.live import run_cli
from tests.support.served import Caller, Folder, Served, make_folder, refused, serve

TEXTS = [f"fact {number}" for number in range(1, 8)]


class Case:
    """A folder with memories of two tenants, a backup of it, and what happened after.

    new, receipts: of one test alone; a folder to restore into, and a copy of the receipts.
    """

    def __init__(self, folder: Folder, path: Path) -> None:
        self.config = folder.copy(path / "data")
        self.credential = folder.credential
        self.backup = path / "backup"
        self.new = self.receipts = Path()
        asyncio.run(self.served(self._fill))
        back_up(self.config, self.backup)
        asyncio.run(self.served(self._after))

    def begin(self, path: Path) -> None:
        """Another test."""
        self.new, self.receipts = path / "new", path / "receipts"
        self.new.mkdir()
        shutil.copy(self.config.root_key_path, self.new)
        shutil.copytree(self.config.folder.receipts, self.receipts)

    async def served(self, work: Callable[[Served], Awaitable[None]], new: bool = False) -> None:
        config = Folder(self.new, self.credential).copy(self.new) if new else self.config
        async with serve(config, self.credential) as served:
            await work(served)

    async def _fill(self, served: Served) -> None:
        for memory in ("teas", "gone-before", "gone-after"):
            await served.create(memory)
            await served.append(f"memories/{memory}", *TEXTS)
        request = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, request)
        made = await served.as_operator(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/acme", api_key=admin.ApiKey(scope=admin.READ_WRITE)
            ),
        )
        theirs = Served(served.server, served.channel, Caller(made.secret))
        await theirs.create("herons")
        await theirs.append("memories/herons", "one")
        await self._delete_memory(served, "gone-before")
        await self._delete_documents(served, "teas", 1)

    async def _after(self, served: Served) -> None:
        await served.append("memories/teas", "fact 8", "fact 9")
        await self._delete_documents(served, "teas", 2, 3, 6, 9)
        await self._delete_memory(served, "gone-after")
        request = admin.DeleteTenantRequest(name="tenants/acme")
        await served.as_operator(served.admin.DeleteTenant, request)

    async def _delete_memory(self, served: Served, memory: str) -> None:
        request = pb.DeleteMemoryRequest(name=f"memories/{memory}")
        await served.as_operator(served.memories.DeleteMemory, request)

    async def _delete_documents(self, served: Served, memory: str, *numbers: int) -> None:
        names = [f"memories/{memory}/documents/{number}" for number in numbers]
        request = pb.DeleteDocumentsRequest(parent=f"memories/{memory}", names=names)
        await served.as_operator(served.memories.DeleteDocuments, request)

    def restore(self, *options: str | Path) -> tuple[int, list[dict[str, object]]]:
        """Exit code and what was printed."""
        done = run_cli("restore", self.backup, *options, "--data-dir", self.new, "--json")
        lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
        return done.returncode, lines

    @property
    def key(self) -> str:
        server_key = load_server_key(self.config.folder.server_key)
        return public_key(server_key.derive(SEED_PURPOSE))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("reapply")
    return Case(make_folder(path / "template"), path)


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    made.begin(tmp_path)
    return made


def test_without_receipts_it_is_said_that_deleted_things_are_back(case: Case) -> None:
    done = run_cli("restore", case.backup, "--data-dir", case.new)
    assert done.returncode == 0
    assert "deleted after the backup" in " ".join(done.stderr.decode().split())

    async def back(served: Served) -> None:
        assert await served.texts("memories/teas") == TEXTS[1:]
        assert await served.texts("memories/gone-after") == TEXTS

    asyncio.run(case.served(back, new=True))


def test_with_receipts_they_are_deleted_again(case: Case) -> None:
    before = sorted(path.name for path in case.receipts.rglob("*.json"))
    code, (_, told) = case.restore("--receipts", case.receipts)
    assert code == 0
    # "acme" and its memory; documents 2, 3 and 6: number 9 came after the backup.
    assert told["reapplied"] == {
        "receipts": 4,
        "tenants": 1,
        "memories": 2,
        "documents": 3,
        "left": [],
    }
    kept = {path.name for path in DataFolder(case.new).receipts.rglob("*.json")}
    # Every proof there was, and one more of each deletion that was made again.
    assert set(before) < kept
    assert len(kept) == len(before) + 4

    async def gone(served: Served) -> None:
        assert await served.texts("memories/teas") == [TEXTS[n - 1] for n in (4, 5, 7)]
        for memory in ("gone-before", "gone-after"):
            request = pb.GetMemoryRequest(name=f"memories/{memory}")
            answer = await refused(served.as_operator(served.memories.GetMemory, request))
            assert answer.reason == "MEMORY_NOT_FOUND"
        listed = await served.as_operator(served.admin.ListTenants, admin.ListTenantsRequest())
        assert [tenant.name for tenant in listed.tenants] == ["tenants/default"]
        # Numbers go on from the backup: what is new is not what was deleted.
        await served.append("memories/teas", "new 8", "new 9")
        assert (await served.texts("memories/teas"))[-2:] == ["new 8", "new 9"]

    asyncio.run(case.served(gone, new=True))
    for path in DataFolder(case.new).tenant("any").parent.iterdir():
        store = open_store(DataFolder(case.new), path.name)
        assert all(2 not in store.document_numbers(one) for one in store.memories())
        store.close()


def test_a_forged_receipt_ends_it_before_anything_is_restored(case: Case) -> None:
    forger = Receipts(DataFolder(case.receipts), bytes(32))
    forger.issue(Destroyed("0" * 32, "1" * 32))
    code, lines = case.restore("--receipts", case.receipts)
    assert code != 0
    assert not [line for line in lines if "files" in line]
    assert [path.name for path in case.new.iterdir()] == ["root.key"]


def test_only_receipts_since_the_backup_count(case: Case) -> None:
    folder, key = case.receipts, case.key
    every = read_deletions(folder, key, 0)
    since = read_deletions(folder, key, begun(case.backup))
    assert (len(every), len(since)) == (6, 4)
    assert every[-4:] == since
    assert [one.documents for one in since[:2]] == ["2-3,6,9", None]
    with pytest.raises(ReceiptError, match="no folder"):
        read_deletions(case.new / "absent", key, 0)
    next(folder.rglob("*.json")).write_text("{}")
    with pytest.raises(ReceiptError, match="not a receipt"):
        read_deletions(folder, key, 0)


def test_what_a_receipt_only_counts_is_said_to_be_left(case: Case) -> None:
    server_key = load_server_key(case.config.folder.server_key)
    receipts = Receipts(DataFolder(case.receipts), server_key.derive(SEED_PURPOSE))
    (since, *_) = read_deletions(case.receipts, case.key, begun(case.backup))
    receipts.issue(Destroyed(since.tenant_uid, since.memory_uid, range(1, 1000, 2)))
    code, (_, told) = case.restore("--receipts", case.receipts)
    assert code == 13
    assert isinstance(told["reapplied"], dict)
    (left,) = told["reapplied"]["left"]
    assert list(case.receipts.rglob(f"{left}.json"))
