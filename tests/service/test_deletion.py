"""Deleting destroys keys, signs for it, and leaves nothing that opens."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from memsvc.receipts import METADATA_KEY, ReceiptError, verify_receipt
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import memory_uid
from storage.catalog import MemoryRow, NotFoundError
from storage.crypto import TenantKeys, open_keys
from storage.crypto.root_keys import read_root_keys
from storage.lmdb_store import LmdbReader
from storage.store import KeyMissingError, MemoryUid
from tests.support.served import Caller, Folder, Serve, Served, refused, serve


async def receipt_of(call: Any) -> bytes | None:
    """The receipt in a finished call's trailing metadata."""
    await call
    found = [value for key, value in await call.trailing_metadata() if key == METADATA_KEY]
    return found[0] if found else None


async def row_of(served: Served, name: str) -> MemoryRow:
    application = served.server.application
    tenant = await application.catalog.get_tenant("default")
    return await application.catalog.get_memory(tenant.uid, name.removeprefix("memories/"))


def statement(served: Served, receipt: bytes | None) -> dict[str, Any]:
    assert receipt is not None
    key = (served.server.application.data.receipts / "public.key").read_text()
    return dict(verify_receipt(receipt, key))


async def delete(served: Served, name: str, *numbers: int, request_id: str = "") -> Any:
    names = [f"{name}/documents/{number}" for number in numbers]
    request = pb.DeleteDocumentsRequest(parent=name, names=names, request_id=request_id)
    return served.as_operator(served.memories.DeleteDocuments, request)


async def test_a_deleted_memorys_key_is_gone_and_signed_for(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons")
        await served.create("otters")
        await served.append(memory.name, "one", "two", "three")
        row = await row_of(served, memory.name)
        keys = served.server.application.keys.tenant(row.tenant_uid)
        assert keys is not None
        assert memory_uid(row) in keys.memories()
        request = pb.DeleteMemoryRequest(name=memory.name)
        receipt = await receipt_of(served.as_operator(served.memories.DeleteMemory, request))
        said = statement(served, receipt)
        assert (said["memory"], said["documents"], said["texts"]) == (row.uid, None, 3)
        assert len(said["key"]) == 32
        assert memory_uid(row) not in keys.memories()
        folder = served.server.application.data
        assert bytes(memory_uid(row)) not in folder.keys(row.tenant_uid).read_bytes()
        kept = list((folder.receipts / row.tenant_uid).iterdir())
        assert [path.read_bytes() for path in kept] == [receipt]
        again = await refused(served.as_operator(served.memories.DeleteMemory, request))
        assert again.reason == "MEMORY_NOT_FOUND"
        request.allow_missing = True
        call = served.as_operator(served.memories.DeleteMemory, request)
        assert await receipt_of(call) is None, "nothing was destroyed twice"


async def test_what_lies_in_a_copy_of_the_file_opens_no_more(start: Serve, tmp_path: Path) -> None:
    """A thief who copied the data before, and takes the keys after."""
    async with start() as served:
        memory = await served.create("herons")
        await served.append(memory.name, *(f"text {n}" for n in range(1, 7)))
        row = await row_of(served, memory.name)
        folder, uid = served.server.application.data, memory_uid(row)
        stolen = tmp_path / "stolen" / row.tenant_uid
        shutil.copytree(folder.tenant(row.tenant_uid), stolen)
        said = statement(served, await receipt_of(await delete(served, memory.name, 2, 3, 5)))
        assert (said["documents"], said["texts"], said["memory"]) == ("2-3,5", 3, row.uid)
        root = read_root_keys(folder.root_key)
        # The tree's new record is in the file of now; he puts it into his copy.
        now = LmdbReader(
            Path(shutil.copytree(folder.tenant(row.tenant_uid), tmp_path / "now" / "x")),
            open_keys(folder.keys(row.tenant_uid), row.tenant_uid, root),
        )
        tree = now._tree(uid)
        assert [d.number for d in now.iter_documents(uid)] == [1, 4, 6]
        now.close()
        thief = LmdbReader(stolen, open_keys(folder.keys(row.tenant_uid), row.tenant_uid, root))
        with pytest.raises(KeyMissingError):
            thief._tree(uid)
        with patch.object(thief, "_tree", lambda _: tree):  # His best case.
            for number in (1, 4, 6):
                assert thief.get_document(uid, number).number == number
            for number in (2, 3, 5):
                with pytest.raises(KeyMissingError):
                    thief.get_document(uid, number)
        thief.close()
        await served.append(memory.name, "text 7")
        assert await served.texts(memory.name) == ["text 1", "text 4", "text 6", "text 7"]


async def test_deleting_twice_signs_once(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons")
        await served.append(memory.name, "one", "two")
        first = await receipt_of(await delete(served, memory.name, 1, request_id="r1"))
        assert statement(served, first)["documents"] == "1"
        again = await receipt_of(await delete(served, memory.name, 1, request_id="r1"))
        assert again is None
        lost = await refused(await delete(served, memory.name, 1))
        assert lost.reason == "DOCUMENT_NOT_FOUND"


async def test_a_tenants_keys_go_with_it(start: Serve) -> None:
    async with start() as served:
        request = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, request)
        application = served.server.application
        tenant = await application.catalog.get_tenant("acme")
        keys = application.keys.tenant(tenant.uid)
        assert keys is not None
        path = application.data.keys(tenant.uid)
        with path.open("rb") as held:
            gone = admin.DeleteTenantRequest(name="tenants/acme")
            call = served.as_operator(served.admin.DeleteTenant, gone)
            said = statement(served, await receipt_of(call))
            assert held.read().strip(b"\0") == b""
        assert (said["tenant"], said["memory"]) == (tenant.uid, "")
        assert not path.exists()


async def test_a_receipt_that_was_altered_is_noticed(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons")
        request = pb.DeleteMemoryRequest(name=memory.name)
        receipt = await receipt_of(served.as_operator(served.memories.DeleteMemory, request))
        key = served.server.application.deletions._receipts.public_key
    assert receipt is not None
    verify_receipt(receipt, key)
    chance = random.Random(3)
    for place in range(len(receipt) - 1):
        altered = bytearray(receipt)
        altered[place] ^= 1 << chance.randrange(8)
        if json_equal(bytes(altered), receipt):
            continue
        with pytest.raises(ReceiptError):
            verify_receipt(bytes(altered), key)
    with pytest.raises(ReceiptError):
        verify_receipt(receipt, "00" * 32)
    for broken in (b"", b"{}", b"[]", b'{"statement": 1, "signature": "00"}', b"[" * 100_000):
        with pytest.raises(ReceiptError):
            verify_receipt(broken, key)


def json_equal(altered: bytes, receipt: bytes) -> bool:
    """Hex digits have two cases."""
    try:
        found, was = json.loads(altered), json.loads(receipt)
    except ValueError:
        return False
    return bool(
        found.keys() == was.keys()
        and found["statement"] == was["statement"]
        and found["signature"].lower() == was["signature"]
    )


async def test_a_tenants_deletion_that_a_crash_cut_short_is_finished(
    folder: Folder, tmp_path: Path
) -> None:
    """Marked, one memory gone, another there: the next start does the rest."""
    config = folder.copy(tmp_path / "data")
    async with serve(config, folder.credential) as served:
        request = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, request)
        key = await served.as_operator(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/acme", api_key=admin.ApiKey(scope=admin.READ_WRITE)
            ),
        )
        theirs = Served(served.server, served.channel, Caller(key.secret))
        memory = await theirs.create("herons", display_name="what acme knows of herons")
        await theirs.append(memory.name, "text canary 88a2")
        catalog = served.server.application.catalog
        tenant = await catalog.get_tenant("acme")
        await catalog.begin_delete_tenant(tenant.uid)
        await catalog.begin_delete_tenant(tenant.uid)
    async with serve(config, folder.credential) as served:
        data, catalog = served.server.application.data, served.server.application.catalog
        assert await catalog.tenants_being_deleted() == []
        with pytest.raises(NotFoundError):
            await catalog.get_tenant("acme")
        assert not data.keys(tenant.uid).exists()
        assert not data.tenant(tenant.uid).exists()
        assert len(list((data.receipts / tenant.uid).iterdir())) == 2
        theirs = Served(served.server, served.channel, Caller(key.secret))
        lost = await refused(
            theirs.as_operator(theirs.memories.ListMemories, pb.ListMemoriesRequest())
        )
        assert lost.reason == "CREDENTIAL_INVALID"


async def test_a_marked_tenants_keys_open_nothing(start: Serve) -> None:
    async with start() as served:
        request = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, request)
        key = await served.as_operator(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/acme", api_key=admin.ApiKey(scope=admin.READ)
            ),
        )
        catalog = served.server.application.catalog
        await catalog.begin_delete_tenant((await catalog.get_tenant("acme")).uid)
        theirs = Caller(key.secret)
        lost = await refused(theirs(served.memories.ListMemories, pb.ListMemoriesRequest()))
        assert lost.reason == "CREDENTIAL_INVALID"


async def test_keys_that_belong_to_no_memory_are_destroyed_at_start(
    folder: Folder, tmp_path: Path
) -> None:
    config = folder.copy(tmp_path / "data")
    async with serve(config, folder.credential) as served:
        memory = await served.create("herons", display_name="herons of the canal")
        row = await row_of(served, memory.name)
    keys = TenantKeys(
        config.folder.keys(row.tenant_uid),
        row.tenant_uid,
        read_root_keys(config.folder.root_key),
    )
    keys.create(MemoryUid(b"o" * 16))
    assert len(keys.memories()) == 2
    async with serve(config, folder.credential) as served:
        found = served.server.application.keys.tenant(row.tenant_uid)
        assert found is not None
        assert found.memories() == [memory_uid(row)]
        get = pb.GetMemoryRequest(name=memory.name)
        shown = await served.as_operator(served.memories.GetMemory, get)
        assert shown.display_name == "herons of the canal"
