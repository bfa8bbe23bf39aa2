"""What a call leaves, and says, when a memory or tenant goes away between two of its steps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.writes import memory_uid
from storage.archive import ArchivedEncoding, write_archive
from storage.catalog import MemoryState, ModelRow, NotFoundError, Packing, PackingMode
from tests.service.test_admin import admin_of, new_tenant
from tests.service.test_deletion import row_of
from tests.service.test_successors import delete, exported, get, import_as
from tests.support.answers import eventually
from tests.support.archives import EMPTY
from tests.support.blocks import LAYOUTS, make_block, make_document
from tests.support.held import Held
from tests.support.served import Serve, Served, refused

MODEL = ModelRow("m", "", "5f" * 32, LAYOUTS[0], 2048, 512, 256, True, 1)


def rename(served: Served, name: str, display_name: str) -> Any:
    memory = resources.Memory(name=name, display_name=display_name)
    request = pb.UpdateMemoryRequest(memory=memory)
    return served.as_operator(served.memories.UpdateMemory, request)


async def test_a_rename_beside_a_deletion_leaves_no_key(served: Served) -> None:
    application = served.server.application
    memory = await served.create("herons", display_name="Herons")
    row = await row_of(served, memory.name)
    sealing = Held(application.fields, "sealed")
    renaming = asyncio.ensure_future(rename(served, memory.name, "Grey herons"))
    await sealing.reached.wait()
    deletion = asyncio.ensure_future(delete(served, memory.name))

    async def ended_or_waits() -> bool:
        users = application.writes.locks._users
        return deletion.done() or users.get((row.tenant_uid, row.memory_id)) == 2

    await eventually(ended_or_waits)
    sealing.go_on.set()
    await asyncio.gather(renaming, deletion, return_exceptions=True)
    keys = application.keys.tenant(row.tenant_uid)
    assert keys is not None
    assert memory_uid(row) not in keys.memories()


async def test_a_fork_has_the_name_that_its_parent_has_now(served: Served) -> None:
    memory = await served.create("herons", display_name="Herons")
    await served.append(memory.name, "one")
    await rename(served, memory.name, "Grey herons")
    await served.fork(memory.name, "forked")
    assert (await get(served, "memories/forked")).display_name == "Grey herons"


def delete_tenant(served: Served, tenant_id: str) -> Any:
    request = admin.DeleteTenantRequest(name=f"tenants/{tenant_id}")
    return served.as_operator(served.admin.DeleteTenant, request)


@pytest.mark.parametrize(
    "step", ["fields.fingerprint", "fields.sealed", "catalog.create_memory", "fields.opened_reply"]
)
async def test_a_memory_made_while_its_tenant_goes_leaves_nothing(
    served: Served, step: str
) -> None:
    application = served.server.application
    await new_tenant(served, "acme")
    manager, _ = await admin_of(served, "tenants/acme")
    tenant = await application.catalog.get_tenant("acme")
    part, method = step.split(".")
    making = Held(getattr(application, part), method)
    memory = resources.Memory(display_name="Herons")
    request = pb.CreateMemoryRequest(memory_id="herons", memory=memory, request_id="r-1")
    call = asyncio.ensure_future(refused(manager(served.memories.CreateMemory, request)))
    await making.reached.wait()
    await delete_tenant(served, "acme")
    making.go_on.set()
    assert (await call).reason == "CREDENTIAL_INVALID"
    assert not application.data.keys(tenant.uid).exists()
    assert not application.data.tenant(tenant.uid).exists()


async def test_a_tenant_deleted_by_two_at_once_is_deleted_once(start: Serve) -> None:
    # Without a share: a tenant that does much has its calls worked on one by one.
    async with start(tenant_work_share=0) as served:
        await deleted_by_two(served)


async def deleted_by_two(served: Served) -> None:
    application = served.server.application
    await new_tenant(served, "acme")
    manager, _ = await admin_of(served, "tenants/acme")
    await manager(served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="herons"))
    purging = Held(application.deletions, "purge_memory")
    first = asyncio.ensure_future(delete_tenant(served, "acme"))
    await purging.reached.wait()
    tenant = await application.catalog.get_tenant("acme")
    second = asyncio.ensure_future(refused(delete_tenant(served, "acme")))

    async def waits() -> bool:
        return application.writes.locks._users.get((tenant.uid, "")) == 2

    await eventually(waits)
    purging.go_on.set()
    await first
    assert (await second).reason == "TENANT_NOT_FOUND"
    receipts = list((application.data.receipts / tenant.uid).iterdir())
    assert len(receipts) == 2, "of the memory and of the tenant"


async def test_a_tenants_deletion_goes_on_when_its_caller_leaves(served: Served) -> None:
    application = served.server.application
    await new_tenant(served, "acme")
    manager, _ = await admin_of(served, "tenants/acme")
    await manager(served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="herons"))
    tenant = await application.catalog.get_tenant("acme")
    purging = Held(application.deletions, "purge_memory")
    call = delete_tenant(served, "acme")
    await purging.reached.wait()
    call.cancel()

    async def left() -> bool:
        return not served.server.calls

    await eventually(left)
    purging.go_on.set()
    await application.writes.drain()
    with pytest.raises(NotFoundError):
        await application.catalog.get_tenant("acme")
    assert not application.data.keys(tenant.uid).exists()


async def test_an_import_under_a_name_that_is_taken_leaves_no_key(served: Served) -> None:
    await served.append((await served.create("source", display_name="Herons")).name, "one")
    data = await exported(served, "memories/source")
    row = await row_of(served, "memories/source")
    answer = await refused(import_as(served, data, "source"))
    assert answer.reason == "ALREADY_EXISTS"
    keys = served.server.application.keys.tenant(row.tenant_uid)
    assert keys is not None
    assert keys.memories() == [memory_uid(row)]


@pytest.mark.parametrize("step", ["commit_import_revisions", "ensure_encoding", "commit_encoded"])
async def test_an_import_whose_memory_is_deleted_says_so(served: Served, step: str) -> None:
    catalog = served.server.application.catalog
    await catalog.upsert_model(MODEL)
    filling = Held(catalog, step)
    importing = asyncio.ensure_future(refused(import_as(served, of_model(MODEL), "target")))
    await filling.reached.wait()
    await delete(served, "memories/target")
    filling.go_on.set()
    assert (await importing).reason == "MEMORY_NOT_FOUND"


async def test_an_import_whose_model_is_replaced_has_its_texts(served: Served) -> None:
    catalog = served.server.application.catalog
    await catalog.upsert_model(MODEL)
    encoded = Held(catalog, "commit_encoded")
    importing = asyncio.ensure_future(import_as(served, of_model(MODEL), "target"))
    await encoded.reached.wait()
    await catalog.upsert_model(replace(MODEL, identity="6f" * 32))
    encoded.go_on.set()
    reply = await importing
    assert (reply.reused_blocks, reply.documents_to_encode) == (0, 2)
    assert await served.texts(reply.memory.name) == ["tea, please"] * 2
    (encoding,) = reply.memory.encodings
    assert (encoding.encoded_documents, encoding.pending_documents) == (0, 2)


def of_model(model: ModelRow) -> bytes:
    """An archive of two documents with a model's blocks."""
    blocks = [make_block(model.layout, number) for number in (1, 2)]
    encoding = ArchivedEncoding(model.model_id, model.identity, model.layout, len(blocks))
    manifest = replace(EMPTY, labels={}, documents=2, encodings=(encoding,))
    made = [make_document(number) for number in (1, 2)]
    return b"".join(write_archive(manifest, made, {encoding.encoding_id: blocks}))


async def leave(served: Served, call: Any) -> None:
    """Cancels a call and waits until its handler has been left."""
    call.cancel()

    async def left() -> bool:
        return not served.server.calls

    await eventually(left)


async def held_keys(served: Served) -> set[str]:
    """Uids of the memories that have a key, in hex."""
    application = served.server.application
    keys = application.keys.tenant((await application.catalog.get_tenant("default")).uid)
    assert keys is not None
    return {uid.hex() for uid in keys.memories()}


@pytest.mark.parametrize("after", [False, True])
async def test_a_caller_who_leaves_while_a_memory_is_made_leaves_no_key_alone(
    served: Served, after: bool
) -> None:
    application = served.server.application
    making = Held(application.catalog, "create_memory", after=after)
    memory = resources.Memory(display_name="Herons")
    request = pb.CreateMemoryRequest(memory_id="herons", memory=memory)
    call = served.as_operator(served.memories.CreateMemory, request)
    await making.reached.wait()
    await leave(served, call)
    making.go_on.set()
    await application.writes.drain()
    listed = await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
    assert await held_keys(served) == {memory.uid for memory in listed.memories}


@pytest.mark.parametrize("after", [False, True])
async def test_a_caller_who_leaves_while_an_import_begins_leaves_nothing(
    served: Served, after: bool
) -> None:
    application = served.server.application
    source = await served.create("source", display_name="Herons")
    data = await exported(served, source.name)
    making = Held(application.catalog, "create_memory", after=after)
    call = import_as(served, data, "target")
    await making.reached.wait()
    call.cancel()

    async def noticed() -> bool:
        return bool(application.writes.locks._abandoned)

    await eventually(noticed)
    making.go_on.set()
    await leave(served, call)
    await application.writes.drain()
    assert await application.catalog.memories_in_state(MemoryState.IMPORTING) == []
    assert await held_keys(served) == {source.uid}


@pytest.mark.parametrize("method", ["attach_model", "commit_fork", "update_tenant"])
async def test_what_is_to_be_encoded_is_looked_at_when_its_caller_left(
    served: Served, method: str
) -> None:
    """Nobody else would have the queue look at it before something else is written."""
    application = served.server.application
    await application.catalog.upsert_model(MODEL)
    memory = await served.create("herons")
    await served.append(memory.name, "one")
    calls = {
        "attach_model": lambda: served.as_operator(
            served.memories.AttachModel,
            pb.AttachModelRequest(memory=memory.name, model="models/m"),
        ),
        "commit_fork": lambda: served.as_operator(
            served.memories.ForkMemory, pb.ForkMemoryRequest(name=memory.name)
        ),
        "update_tenant": lambda: served.as_operator(
            served.admin.UpdateTenant,
            admin.UpdateTenantRequest(
                tenant=admin.Tenant(name="tenants/default", default_model="models/m")
            ),
        ),
    }
    woken: list[bool] = []
    real = application.encoding.wake

    def wake() -> None:
        woken.append(True)
        real()

    committed = Held(application.catalog, method, after=True)
    application.encoding.wake = wake  # type: ignore[method-assign]  # counts, and does it
    call = calls[method]()
    await committed.reached.wait()
    await leave(served, call)
    committed.go_on.set()
    await application.writes.drain()
    assert woken


async def test_an_import_clears_up_in_its_own_tenant_alone(served: Served) -> None:
    """Under a name that is taken it looks for what an earlier one left."""
    source = await served.create("source")
    data = await exported(served, source.name)
    await new_tenant(served, "acme")
    catalog = served.server.application.catalog
    for tenant_id in ("acme", "default"):
        tenant = await catalog.get_tenant(tenant_id)
        packing = Packing(PackingMode.TURN, 0, 0)
        state = MemoryState.IMPORTING
        await catalog.create_memory(tenant.uid, "left", "", {}, packing, state, None)
    await import_as(served, data, "left")
    theirs = await catalog.memories_in_state(MemoryState.IMPORTING)
    assert [row.tenant_uid for row in theirs] == [(await catalog.get_tenant("acme")).uid]


async def test_a_tenant_may_go_while_one_of_its_memories_is_deleted(served: Served) -> None:
    application = served.server.application
    await new_tenant(served, "acme")
    manager, _ = await admin_of(served, "tenants/acme")
    await manager(served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="herons"))
    tenant = await application.catalog.get_tenant("acme")
    marking = Held(application.catalog, "begin_delete_memory")
    request = pb.DeleteMemoryRequest(name="memories/herons")
    deletion = asyncio.ensure_future(manager(served.memories.DeleteMemory, request))
    await marking.reached.wait()
    of_tenant = asyncio.ensure_future(delete_tenant(served, "acme"))

    async def waits() -> bool:
        return application.writes.locks._users.get((tenant.uid, "herons")) == 2

    await eventually(waits)
    marking.go_on.set()
    await asyncio.gather(deletion, of_tenant)
    with pytest.raises(NotFoundError):
        await application.catalog.get_tenant("acme")
    assert not application.data.keys(tenant.uid).exists()
    assert not application.data.tenant(tenant.uid).exists()
