"""Receipts of deletions, fetched and listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from memsvc.cli.main import build
from memsvc.receipts import verify_receipt
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.support.served import Caller, Served, refused


async def listed(
    served: Served, tenant: str = "default", **paging: object
) -> admin.ListDeletionReceiptsResponse:
    request = admin.ListDeletionReceiptsRequest(
        parent=f"tenants/{tenant}",
        **paging,  # type: ignore[arg-type]  # by name
    )
    reply: admin.ListDeletionReceiptsResponse = await served.as_operator(
        served.admin.ListDeletionReceipts, request
    )
    return reply


async def delete_documents(served: Served, memory: str, *numbers: int) -> None:
    names = [f"{memory}/documents/{number}" for number in numbers]
    request = pb.DeleteDocumentsRequest(parent=memory, names=names)
    await served.as_operator(served.memories.DeleteDocuments, request)


async def test_what_was_destroyed_is_listed_and_proved(served: Served) -> None:
    memory = await served.create("herons")
    await served.append(memory.name, *(f"turn {number}" for number in range(1, 8)))
    assert not (await listed(served)).deletion_receipts
    await delete_documents(served, memory.name, 1, 2, 3, 7)
    request = pb.DeleteMemoryRequest(name=memory.name)
    await served.as_operator(served.memories.DeleteMemory, request)
    whole, some = (await listed(served)).deletion_receipts
    assert (some.documents, some.texts, some.blocks) == ("1-3,7", 4, 0)
    assert (whole.documents, whole.texts) == ("", 3)
    assert some.memory_uid == whole.memory_uid == memory.uid
    assert some.issue_time.ToMicroseconds() < whole.issue_time.ToMicroseconds()
    key = (served.server.application.data.receipts / "public.key").read_text()
    said = verify_receipt(some.receipt, key)
    assert (said["memory"], said["documents"]) == (memory.uid, "1-3,7")
    got = await served.as_operator(
        served.admin.GetDeletionReceipt, admin.GetDeletionReceiptRequest(name=some.name)
    )
    assert got == some


async def test_pages(served: Served) -> None:
    memory = await served.create("herons")
    await served.append(memory.name, *(f"turn {number}" for number in range(1, 8)))
    for number in range(1, 6):
        await delete_documents(served, memory.name, number)
    pages, token = [], ""
    while True:
        page = await listed(served, page_size=2, page_token=token)
        pages.append([one.documents for one in page.deletion_receipts])
        token = page.next_page_token
        if not token:
            break
    assert pages == [["5", "4"], ["3", "2"], ["1"]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "FIELD_REQUIRED"),
        ("tenants/default/deletionReceipts/../../x", "FIELD_INVALID"),
        ("tenants/default/deletionReceipts/0000000000000000-0000000Z", "FIELD_INVALID"),
        ("tenants/default/deletionReceipts/0000000000000000-00000000", "RECEIPT_NOT_FOUND"),
        ("tenants/absent/deletionReceipts/0000000000000000-00000000", "TENANT_NOT_FOUND"),
    ],
)
async def test_what_is_no_receipt(served: Served, name: str, reason: str) -> None:
    request = admin.GetDeletionReceiptRequest(name=name)
    answer = await refused(served.as_operator(served.admin.GetDeletionReceipt, request))
    assert (answer.reason, answer.field) == (reason, "name")


async def test_one_that_was_altered_on_disk_is_said_to_be(served: Served) -> None:
    memory = await served.create("herons")
    await served.as_operator(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name))
    (receipt,) = (await listed(served)).deletion_receipts
    (path,) = served.server.application.data.receipts.rglob("*.json")
    for text in (b"", b"[]", b"{}", b'{"statement": "{}"}', b'{"statement": "{\\"version\\": 1}"}'):
        path.write_bytes(text)
        for call, request in (
            (served.admin.GetDeletionReceipt, admin.GetDeletionReceiptRequest(name=receipt.name)),
            (
                served.admin.ListDeletionReceipts,
                admin.ListDeletionReceiptsRequest(parent="tenants/default"),
            ),
        ):
            answer = await refused(served.as_operator(call, request))
            assert (answer.code, answer.reason) == ("DATA_LOSS", "RECORD_CORRUPT")


async def test_a_tenants_admin_sees_its_own(served: Served) -> None:
    request = admin.CreateTenantRequest(tenant_id="acme")
    await served.as_operator(served.admin.CreateTenant, request)
    made = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent="tenants/acme", api_key=admin.ApiKey(scope=admin.ADMIN)),
    )
    theirs = Served(served.server, served.channel, Caller(made.secret))
    memory = await served.create("herons")
    await served.as_operator(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name))
    assert not (await listed(theirs, "acme")).deletion_receipts
    answer = await refused(listed(theirs))
    assert answer.reason == "TENANT_NOT_FOUND"


async def test_the_command_shows_and_saves_them(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    memory = await served.create("herons")
    await served.append(memory.name, "one", "two")
    await delete_documents(served, memory.name, 2)
    ((_, value),) = served.as_operator.metadata
    monkeypatch.setenv("MEMSVC_API_KEY", value.removeprefix("Bearer "))
    monkeypatch.setenv("MEMSVC_ADDRESS", served.server.address)
    arguments = ["admin", "receipts", "--save", str(tmp_path / "kept")]
    done = await asyncio.to_thread(CliRunner().invoke, build(), arguments)
    assert done.exit_code == 0, done.output
    (receipt,) = (await listed(served)).deletion_receipts
    name = receipt.name.rpartition("/")[2]
    assert name in done.output
    assert (tmp_path / "kept" / f"{name}.json").read_bytes() == receipt.receipt
