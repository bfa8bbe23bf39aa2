"""Whom a token names is looked up anew: tenants and memories come, go, and leave their names."""

from __future__ import annotations

import asyncio
from pathlib import Path

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.service.test_tokens import INVALID, is_refused, issuer, lists, settings, tokens
from tests.support.held import Held
from tests.support.served import Caller, Serve, Served, refused, turns
from tests.support.tokens import Issuer

__all__ = ["issuer", "tokens"]


async def test_a_memory_that_a_token_names_may_be_made_later(
    tokens: Served, issuer: Issuer
) -> None:
    """What a token names is a name: the issuer may hand it out before, or for a new beginning."""
    token = issuer.token("k1", memsvc_memories=["memories/mine", "memories/later"])
    await tokens.create("mine")
    assert await lists(tokens, token) == ["memories/mine"]
    await tokens.create("later")
    await tokens.create("other")
    assert await lists(tokens, token) == ["memories/later", "memories/mine"]
    delete = pb.DeleteMemoryRequest(name="memories/mine")
    await tokens.as_operator(tokens.memories.DeleteMemory, delete)
    assert await lists(tokens, token) == ["memories/later"]
    await tokens.create("mine")
    assert await lists(tokens, token) == ["memories/mine", "memories/later"]


async def test_a_deleted_tenants_tokens_do_not_reach_its_namesake(
    tokens: Served, issuer: Issuer
) -> None:
    async def make() -> None:
        request = admin.CreateTenantRequest(tenant_id="acme")
        await tokens.as_operator(tokens.admin.CreateTenant, request)

    await make()
    caller = Caller(issuer.token("k1", memsvc_tenant="acme"))
    memory = await caller(tokens.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="mine"))
    events = aiter(caller(tokens.memories.WatchMemory, pb.WatchMemoryRequest(name=memory.name)))
    await anext(events)
    request = admin.DeleteTenantRequest(name="tenants/acme")
    await tokens.as_operator(tokens.admin.DeleteTenant, request)
    assert (await refused(events)).reason == INVALID[1]
    assert (await refused(lists(tokens, issuer.token("k1", memsvc_tenant="acme")))).reason
    await make()
    # The issuer names tenants: what it says of the name now holds for the new one.
    assert await lists(tokens, issuer.token("k1", memsvc_tenant="acme")) == []


async def test_tokens_of_a_tenant_that_is_being_deleted_open_nothing(
    start: Serve, issuer: Issuer, tmp_path: Path
) -> None:
    """Also after a restart that could not finish the deletion: its store is on another volume."""
    async with start(**settings(issuer)) as served:
        request = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, request)
        caller = Caller(issuer.token("k1", memsvc_tenant="acme"))
        memory = await caller(served.memories.CreateMemory, pb.CreateMemoryRequest())
        append = pb.AppendTurnsRequest(memory=memory.name, turns=turns("kept"))
        await caller(served.memories.AppendTurns, append)
        application = served.server.application
        tenant = await application.catalog.get_tenant("acme")
        await application.catalog.begin_delete_tenant(tenant.uid)
        store = application.data.tenant(tenant.uid)
    store.symlink_to(store.rename(tmp_path / "elsewhere"))
    async with start(**settings(issuer)) as served:
        left = await served.server.application.catalog.tenants_being_deleted()
        assert [row.uid for row in left] == [tenant.uid]
        await is_refused(served, issuer.token("k1", memsvc_tenant="acme"))


async def test_a_token_that_comes_while_its_tenant_goes_is_the_next_ones(
    tokens: Served, issuer: Issuer
) -> None:
    """What was found of the tenant before it was deleted is not remembered after that."""
    make = admin.CreateTenantRequest(tenant_id="acme")
    await tokens.as_operator(tokens.admin.CreateTenant, make)
    token = issuer.token("k1", memsvc_tenant="acme")
    finding = Held(tokens.server.application.catalog, "get_tenant", after=True)
    early = asyncio.ensure_future(refused(lists(tokens, token)))
    await finding.reached.wait()
    finding.let_others_pass()
    request = admin.DeleteTenantRequest(name="tenants/acme")
    await tokens.as_operator(tokens.admin.DeleteTenant, request)
    finding.go_on.set()
    assert (await early).reason == INVALID[1]
    await tokens.as_operator(tokens.admin.CreateTenant, make)
    assert await lists(tokens, token) == []
