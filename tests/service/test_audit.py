"""What is written down of administrative and destructive acts, and who may read it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from memsvc.audit import AUDITED, REFUSALS_PER_MINUTE, audit_key
from memsvc.audit_check import contains, verify_trails
from memsvc.auth import SCOPES, load_server_key
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from storage.catalog import CatalogUnavailableError, Scope
from tests.support.served import Caller, Served, refused, turns

#: Calls that change something and are neither administrative nor destructive.
EVERYDAY = {
    "CreateMemory",
    "AppendTurns",
    "PutDocuments",
    "ImportMemory",
    "AttachModel",
    "Register",
}

#: Archives that one tenant may have on their way at once.
_ARCHIVES_OF_TENANT = 2


async def events(
    served: Served, tenant: str = "default", caller: Caller | None = None
) -> list[admin.AuditEvent]:
    reply = await (caller or served.as_operator)(
        served.admin.ListAuditEvents,
        admin.ListAuditEventsRequest(parent=f"tenants/{tenant}", page_size=1000),
    )
    return list(reply.audit_events)


async def new_admin(served: Served, tenant: str) -> tuple[Caller, str]:
    await served.as_operator(served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id=tenant))
    reply = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent=f"tenants/{tenant}", api_key=admin.ApiKey(scope=admin.ADMIN)
        ),
    )
    return Caller(reply.secret), reply.api_key.name


def told(entries: list[admin.AuditEvent]) -> list[tuple[str, str, str]]:
    """Oldest first."""
    return [(e.action, e.resource, e.outcome) for e in entries[::-1]]


def test_every_call_that_changes_something_is_written_down_or_everyday() -> None:
    reads = {path for path, scope in SCOPES.items() if scope is Scope.READ}
    reads |= {path for path in SCOPES if path.rpartition("/")[2].startswith(("Get", "List"))}
    named = {path.rpartition("/")[2] for path in set(SCOPES) - reads - set(AUDITED)}
    assert named == EVERYDAY


async def test_an_act_is_written_down_before_and_after(served: Served) -> None:
    memory = await served.create("doomed")
    await served.append(memory.name, "what the user wrote")
    before = len(await events(served))
    await served.as_operator(
        served.memories.DeleteDocuments,
        pb.DeleteDocumentsRequest(parent=memory.name, names=[f"{memory.name}/documents/1"]),
    )
    await served.as_operator(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name))
    again = served.as_operator(
        served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name)
    )
    assert (await refused(again)).reason == "MEMORY_NOT_FOUND"
    found = await events(served)
    assert told(found[: len(found) - before]) == [
        ("DeleteDocuments", "memories/doomed", "STARTED"),
        ("DeleteDocuments", "memories/doomed", "OK"),
        ("DeleteMemory", "memories/doomed", "STARTED"),
        ("DeleteMemory", "memories/doomed", "OK"),
        ("DeleteMemory", "memories/doomed", "STARTED"),
        ("DeleteMemory", "memories/doomed", "MEMORY_NOT_FOUND"),
    ]
    key = (
        await served.as_operator(
            served.admin.ListApiKeys, admin.ListApiKeysRequest(parent="tenants/default")
        )
    ).api_keys[0]
    assert {event.actor for event in found[: len(found) - before]} == {key.name.rpartition("/")[2]}
    assert found[0].sequence == len(found)
    assert found[0].time.ToSeconds() > 1_700_000_000


async def test_setting_up_is_the_first_entry(served: Served) -> None:
    first = (await events(served))[-1]
    assert (first.actor, first.action, first.outcome) == ("memsvc init", "CreateApiKey", "OK")
    assert first.resource.startswith("tenants/default/apiKeys/")


async def test_an_export_is_written_down_also_when_its_reader_leaves(served: Served) -> None:
    memory = await served.create("leaving")
    await served.append(memory.name, "x")
    async for _ in served.as_operator(
        served.memories.ExportMemory, pb.ExportMemoryRequest(name=memory.name)
    ):
        pass
    missing = served.as_operator(
        served.memories.ExportMemory, pb.ExportMemoryRequest(name="memories/absent")
    )
    await refused(missing)
    assert told((await events(served))[:4]) == [
        ("ExportMemory", "memories/leaving", "STARTED"),
        ("ExportMemory", "memories/leaving", "OK"),
        ("ExportMemory", "memories/absent", "STARTED"),
        ("ExportMemory", "memories/absent", "MEMORY_NOT_FOUND"),
    ]


async def test_an_export_without_room_is_no_act(served: Served) -> None:
    memory = await served.create("wanted")
    before = len(await events(served))
    tenant = (await served.server.application.catalog.get_tenant("default")).uid
    async with AsyncExitStack() as stack:
        for _ in range(_ARCHIVES_OF_TENANT):
            await stack.enter_async_context(served.server.application.staging.file(tenant))
        request = pb.ExportMemoryRequest(name=memory.name)
        call = served.as_operator(served.memories.ExportMemory, request)
        assert (await refused(_read(call))).reason == "OVERLOADED"
    assert len(await events(served)) == before
    await _read(served.as_operator(served.memories.ExportMemory, request))
    assert len(await events(served)) == before + 2


async def _read(replies: Any) -> None:
    async for _ in replies:
        pass


async def test_keys_are_in_the_trail_of_their_tenant(served: Served) -> None:
    caller, name = await new_admin(served, "acme")
    rotated = await caller(served.admin.RotateApiKey, admin.RotateApiKeyRequest(name=name))
    await caller(served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=name))
    holder = Caller(rotated.secret)
    found = await events(served, "acme", holder)
    assert told(found) == [
        ("CreateApiKey", "tenants/acme", "STARTED"),
        ("CreateApiKey", name, "OK"),
        ("RotateApiKey", name, "STARTED"),
        ("RotateApiKey", rotated.api_key.name, "OK"),
        ("RevokeApiKey", name, "STARTED"),
        ("RevokeApiKey", name, "OK"),
    ]
    # The tenant itself was the operator's act; its end will be as well.
    await served.as_operator(
        served.admin.DeleteTenant, admin.DeleteTenantRequest(name="tenants/acme")
    )
    assert told((await events(served))[:2]) == [
        ("DeleteTenant", "tenants/acme", "STARTED"),
        ("DeleteTenant", "tenants/acme", "OK"),
    ]
    assert ("CreateTenant", "tenants/acme", "OK") in told(await events(served))


async def test_who_may_read_it(served: Served) -> None:
    caller, _ = await new_admin(served, "acme")
    for tenant in ("default", "never-was"):
        answer = await refused(events(served, tenant, caller))
        assert (answer.reason, answer.field) == ("TENANT_NOT_FOUND", "parent")
    reader = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ_WRITE)
        ),
    )
    answer = await refused(events(served, "default", Caller(reader.secret)))
    assert answer.reason == "SCOPE_INSUFFICIENT"


async def test_acts_that_the_scope_forbids_are_written_down(served: Served) -> None:
    memory = await served.create("wanted")
    made = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ)),
    )
    reader, before = Caller(made.secret), len(await events(served))
    delete = pb.DeleteMemoryRequest(name=memory.name)
    # One after the other: a call is under way as soon as it is made.
    for method, request in (
        (served.memories.DeleteMemory, delete),
        (served.admin.ListTenants, admin.ListTenantsRequest()),
        (served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="mine")),
    ):
        assert (await refused(reader(method, request))).reason == "SCOPE_INSUFFICIENT"
    found = (await events(served))[: len(await events(served)) - before]
    assert told(found) == [
        ("DeleteMemory", "", "SCOPE_INSUFFICIENT"),
        ("ListTenants", "", "SCOPE_INSUFFICIENT"),
    ]
    assert {entry.actor for entry in found} == {made.api_key.name.rpartition("/")[2]}


async def test_one_key_cannot_fill_the_trail(served: Served) -> None:
    made = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ)),
    )
    reader, before = Caller(made.secret), len(await events(served))
    for _ in range(REFUSALS_PER_MINUTE + 20):
        await refused(reader(served.admin.ListTenants, admin.ListTenantsRequest()))
    assert REFUSALS_PER_MINUTE <= len(await events(served)) - before < REFUSALS_PER_MINUTE + 20


async def test_a_refusal_stands_when_it_cannot_be_written_down(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ)),
    )

    async def down(*_: object, **__: object) -> Any:
        raise CatalogUnavailableError("gone")

    monkeypatch.setattr(served.server.application.catalog, "add_audit", down)
    answer = await refused(
        Caller(made.secret)(served.admin.ListTenants, admin.ListTenantsRequest())
    )
    assert answer.reason == "SCOPE_INSUFFICIENT"


async def test_pages(served: Served) -> None:
    for index in range(4):
        await served.create(f"memory-{index}")
        request = pb.DeleteMemoryRequest(name=f"memories/memory-{index}")
        await served.as_operator(served.memories.DeleteMemory, request)
    whole, seen, token = await events(served), [], ""
    while True:
        page = await served.as_operator(
            served.admin.ListAuditEvents,
            admin.ListAuditEventsRequest(parent="tenants/default", page_size=3, page_token=token),
        )
        seen += list(page.audit_events)
        token = page.next_page_token
        if not token:
            break
    assert seen == whole


async def test_what_is_no_name_is_left_out(served: Served) -> None:
    """A name field may hold anything that a user wrote."""
    for name in ("Anna told me: my PIN is 4711", "memories/Anna's PIN", "memories/a/b/c/d"):
        request = pb.DeleteMemoryRequest(name=name)
        assert (await refused(served.as_operator(served.memories.DeleteMemory, request))).reason
        assert [e.resource for e in (await events(served))[:2]] == ["", ""]


async def test_an_act_that_cannot_be_written_down_is_not_done(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = await served.create("kept")
    catalog = served.server.application.catalog

    async def down(*_: object, **__: object) -> Any:
        raise CatalogUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "add_audit", down)
        request = pb.DeleteMemoryRequest(name=memory.name)
        answer = await refused(served.as_operator(served.memories.DeleteMemory, request))
        assert answer.reason == "CATALOG_UNAVAILABLE"
    await served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name))


async def test_the_chain_holds_under_many_writers(served: Served) -> None:
    names = [(await served.create(f"memory-{index}")).name for index in range(10)]
    await asyncio.gather(
        *(
            served.as_operator(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=name))
            for name in names
        )
    )
    application = served.server.application
    key = audit_key(load_server_key(application.data.server_key))
    (trail,) = [trail async for trail in verify_trails(application.catalog, key)]
    assert not trail.problem
    newest = (await events(served))[0]
    assert (trail.entries, trail.head) == (newest.sequence, newest.digest)
    tenant = trail.tenant_uid
    assert await contains(application.catalog, tenant, newest.sequence, newest.digest)
    assert not await contains(application.catalog, tenant, newest.sequence, "0" * 64)
    assert not await contains(application.catalog, tenant, newest.sequence + 1, newest.digest)
    # With another key, as of another server, nothing fits.
    (other,) = [trail async for trail in verify_trails(application.catalog, bytes(32))]
    assert other.problem == "entry 1 is not as it was written"


async def test_everyday_calls_are_not_written_down(served: Served) -> None:
    before = len(await events(served))
    memory = await served.create("everyday")
    labelled = resources.Memory(name=memory.name, labels={"kind": "person"})
    await served.as_operator(served.memories.UpdateMemory, pb.UpdateMemoryRequest(memory=labelled))
    await served.as_operator(
        served.memories.AppendTurns,
        pb.AppendTurnsRequest(memory=memory.name, turns=turns("nothing to see")),
    )
    assert len(await events(served)) == before


@pytest.mark.parametrize("paths", [[], ["retention"]])
async def test_a_retention_is_written_down(served: Served, paths: list[str]) -> None:
    """What is older goes by it."""
    memory = await served.create()
    brief = resources.Memory(name=memory.name, retention=Duration(seconds=3600))
    request = pb.UpdateMemoryRequest(memory=brief, update_mask=FieldMask(paths=paths))
    await served.as_operator(served.memories.UpdateMemory, request)
    written = [("UpdateMemory", memory.name, outcome) for outcome in ("STARTED", "OK")]
    assert told(await events(served))[-2:] == written
