"""What is asked of one memory is never done to a later one that took its name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from grpc import aio

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.service.test_admin import admin_of, new_tenant
from tests.support.answers import eventually
from tests.support.held import Held
from tests.support.served import Served, refused


async def exported(served: Served, memory: str) -> bytes:
    call = served.as_operator(served.memories.ExportMemory, pb.ExportMemoryRequest(name=memory))
    return b"".join([reply.data async for reply in call])


def import_as(served: Served, data: bytes, memory_id: str, request_id: str = "") -> Any:
    def messages() -> Iterator[pb.ImportMemoryRequest]:
        header = pb.ImportMemoryRequest.Header(memory_id=memory_id, request_id=request_id)
        yield pb.ImportMemoryRequest(header=header)
        yield pb.ImportMemoryRequest(data=data)

    return served.as_operator(served.memories.ImportMemory, messages())


def delete(served: Served, name: str, **fields: Any) -> Any:
    request = pb.DeleteMemoryRequest(name=name, **fields)
    return served.as_operator(served.memories.DeleteMemory, request)


def delete_documents(served: Served, memory: str, number: int, request_id: str) -> Any:
    request = pb.DeleteDocumentsRequest(
        parent=memory, names=[f"{memory}/documents/{number}"], request_id=request_id
    )
    return served.as_operator(served.memories.DeleteDocuments, request)


async def get(served: Served, name: str) -> resources.Memory:
    request = pb.GetMemoryRequest(name=name)
    found: resources.Memory = await served.as_operator(served.memories.GetMemory, request)
    return found


async def test_an_import_that_fails_spares_the_memory_that_took_its_name(served: Served) -> None:
    await served.append((await served.create("source")).name, "old")
    data = await exported(served, "memories/source")
    activation = Held(served.server.application.catalog, "activate_memory")
    importing = asyncio.ensure_future(refused(import_as(served, data, "target")))
    await activation.reached.wait()
    await delete(served, "memories/target")
    target = await served.create("target")
    await served.append(target.name, "precious")
    activation.go_on.set()
    assert (await importing).reason == "MEMORY_NOT_FOUND"
    assert await served.texts(target.name) == ["precious"]


async def test_an_import_whose_caller_leaves_at_its_commit_stays(served: Served) -> None:
    application = served.server.application
    await served.append((await served.create("source")).name, "old")
    data = await exported(served, "memories/source")
    activation = Held(application.catalog, "activate_memory", after=True)
    call = import_as(served, data, "target", "i-1")
    await activation.reached.wait()
    call.cancel()
    with suppress(asyncio.CancelledError, aio.AioRpcError):
        await call

    async def ended() -> bool:
        return not application.importing

    await eventually(ended)
    again = await import_as(served, data, "target", "i-1")
    assert again.memory.name == "memories/target"
    assert await served.texts("memories/target") == ["old"]


async def test_a_deletion_asked_for_twice_spares_the_memory_that_took_its_name(
    served: Served,
) -> None:
    application = served.server.application
    old = await served.create("herons")
    tenant = await application.catalog.get_tenant("default")
    waiting = Held(application.deletions, "_evict")
    catalog: Any = application.catalog
    finding = catalog.get_memory
    looked = asyncio.Semaphore(0)

    async def counted(*args: Any, **kwargs: Any) -> Any:
        found = await finding(*args, **kwargs)
        looked.release()
        return found

    catalog.get_memory = counted
    async with application.writes.locks.exclusive(tenant.uid, "herons"):
        calls = [delete(served, old.name, etag=old.etag) for _ in range(2)]
        both = asyncio.gather(*calls, return_exceptions=True)
        for _ in calls:
            await looked.acquire()
    await waiting.reached.wait()
    new = await served.create("herons")
    waiting.go_on.set()
    assert any(error is not None for error in await both)
    assert (await get(served, new.name)).uid == new.uid != old.uid


async def test_a_late_rename_spares_the_memory_that_took_its_name(served: Served) -> None:
    old = await served.create("herons", display_name="Herons")
    # Behind this it has the memory's lock, for which a deletion waits.
    change = Held(served.server.application.writes, "change")
    request = pb.UpdateMemoryRequest(
        memory=resources.Memory(name=old.name, display_name="Grey herons")
    )
    late = asyncio.ensure_future(refused(served.as_operator(served.memories.UpdateMemory, request)))
    await change.reached.wait()
    await delete(served, old.name)
    await served.create("herons", display_name="Others")
    change.go_on.set()
    assert (await late).reason == "MEMORY_NOT_FOUND"
    assert (await get(served, old.name)).display_name == "Others"


async def test_a_request_id_is_of_the_memory_that_it_was_used_for(served: Served) -> None:
    """An application whose request ids are its own, as turn-1, begins a memory anew."""
    memory = await served.create("herons")
    await served.append(memory.name, "one", request_id="turn-1")
    await delete_documents(served, memory.name, 1, "delete-1")
    await delete(served, memory.name)
    await served.create("herons")
    await served.append(memory.name, "kept")
    for call in (
        served.append(memory.name, "one", request_id="turn-1"),
        delete_documents(served, memory.name, 1, "delete-1"),
    ):
        assert (await refused(call)).reason == "REQUEST_ID_REUSED"
    assert await served.texts(memory.name) == ["kept"]


async def test_a_repeated_call_of_a_memory_that_is_gone_gets_its_reply(served: Served) -> None:
    memory = await served.create("herons")
    first = await served.append(memory.name, "one", request_id="turn-1")
    await delete(served, memory.name)
    assert await served.append(memory.name, "one", request_id="turn-1") == first


async def test_a_repeated_making_of_a_memory_that_is_gone_says_so(served: Served) -> None:
    request = pb.CreateMemoryRequest(memory_id="herons", request_id="create-1")
    made = await served.as_operator(served.memories.CreateMemory, request)
    data = await exported(served, made.name)
    await import_as(served, data, "imported", "import-1")
    fork = pb.ForkMemoryRequest(name=made.name, memory_id="forked", request_id="fork-1")
    await served.as_operator(served.memories.ForkMemory, fork)
    for name in ("memories/imported", "memories/forked"):
        await delete(served, name)
    for repeated in (
        import_as(served, data, "imported", "import-1"),
        served.as_operator(served.memories.ForkMemory, fork),
    ):
        assert (await refused(repeated)).reason == "MEMORY_NOT_FOUND"
    await delete(served, made.name)
    repeated = served.as_operator(served.memories.CreateMemory, request)
    assert (await refused(repeated)).reason == "MEMORY_NOT_FOUND"


async def test_an_admin_does_not_see_the_tenant_that_took_its_tenants_name(
    served: Served,
) -> None:
    await new_tenant(served, "acme")
    manager, _ = await admin_of(served, "tenants/acme")
    looking = Held(served.server.application.catalog, "get_tenant")
    listing = asyncio.ensure_future(
        refused(manager(served.admin.ListTenants, admin.ListTenantsRequest()))
    )
    await looking.reached.wait()
    looking.let_others_pass()
    await begin_anew(served, "acme")
    looking.go_on.set()
    assert (await listing).reason == "TENANT_NOT_FOUND"


async def test_a_late_change_of_a_tenant_spares_the_one_that_took_its_name(
    served: Served,
) -> None:
    await new_tenant(served, "acme")
    manager, _ = await admin_of(served, "tenants/acme")
    change = Held(served.server.application.catalog, "update_tenant")
    wanted = admin.Tenant(name="tenants/acme", display_name="Of the first")
    request = admin.UpdateTenantRequest(tenant=wanted)
    late = asyncio.ensure_future(refused(manager(served.admin.UpdateTenant, request)))
    await change.reached.wait()
    await begin_anew(served, "acme")
    change.go_on.set()
    assert (await late).reason == "TENANT_NOT_FOUND"
    get = admin.GetTenantRequest(name="tenants/acme")
    found = await served.as_operator(served.admin.GetTenant, get)
    assert found.display_name == "The acme"


async def begin_anew(served: Served, tenant_id: str) -> None:
    """Deletes a tenant and makes another one of its name."""
    request = admin.DeleteTenantRequest(name=f"tenants/{tenant_id}")
    await served.as_operator(served.admin.DeleteTenant, request)
    await new_tenant(served, tenant_id)
