from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.support.served import Caller, Served, names_of, refused, turns


async def new_tenant(served: Served, tenant_id: str) -> admin.Tenant:
    tenant: admin.Tenant = await served.as_operator(
        served.admin.CreateTenant,
        admin.CreateTenantRequest(
            tenant_id=tenant_id, tenant=admin.Tenant(display_name=f"The {tenant_id}")
        ),
    )
    return tenant


async def admin_of(served: Served, tenant: str) -> tuple[Caller, admin.ApiKey]:
    reply = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent=tenant, api_key=admin.ApiKey(scope=admin.ADMIN)),
    )
    return Caller(reply.secret), reply.api_key


async def test_tenants_are_made_and_listed_newest_first(served: Served) -> None:
    for index in range(4):
        await new_tenant(served, f"tenant-{index}")
    seen: list[str] = []
    token = ""
    while True:
        page = await served.as_operator(
            served.admin.ListTenants, admin.ListTenantsRequest(page_size=2, page_token=token)
        )
        seen += names_of(page.tenants)
        token = page.next_page_token
        if not token:
            break
    assert seen == [*(f"tenants/tenant-{i}" for i in (3, 2, 1, 0)), "tenants/default"]
    got = await served.as_operator(
        served.admin.GetTenant, admin.GetTenantRequest(name="tenants/tenant-2")
    )
    assert got.display_name == "The tenant-2"


@pytest.mark.parametrize(
    ("call", "request_", "reason", "field"),
    [
        ("CreateTenant", admin.CreateTenantRequest(), "FIELD_REQUIRED", "tenant_id"),
        ("CreateTenant", admin.CreateTenantRequest(tenant_id="X"), "FIELD_INVALID", "tenant_id"),
        (
            "CreateTenant",
            admin.CreateTenantRequest(tenant_id="default"),
            "ALREADY_EXISTS",
            "tenant_id",
        ),
        ("GetTenant", admin.GetTenantRequest(name="tenants/none"), "TENANT_NOT_FOUND", "name"),
        (
            "DeleteTenant",
            admin.DeleteTenantRequest(name="tenants/none"),
            "TENANT_NOT_FOUND",
            "name",
        ),
        (
            "DeleteTenant",
            admin.DeleteTenantRequest(name="tenants/default"),
            "FIELD_INVALID",
            "name",
        ),
        ("GetUsage", admin.GetUsageRequest(name="tenants/none"), "TENANT_NOT_FOUND", "name"),
        (
            "CreateApiKey",
            admin.CreateApiKeyRequest(parent="tenants/default"),
            "FIELD_REQUIRED",
            "api_key.scope",
        ),
        (
            "CreateApiKey",
            admin.CreateApiKeyRequest(
                parent="tenants/default",
                api_key=admin.ApiKey(scope=7),  # type: ignore[arg-type]  # unknown
            ),
            "FIELD_INVALID",
            "api_key.scope",
        ),
        (
            "CreateApiKey",
            admin.CreateApiKeyRequest(
                parent="tenants/default",
                api_key=admin.ApiKey(scope=admin.READ, expire_time=Timestamp(seconds=1)),
            ),
            "FIELD_INVALID",
            "api_key.expire_time",
        ),
        (
            "CreateApiKey",
            admin.CreateApiKeyRequest(
                parent="tenants/none", api_key=admin.ApiKey(scope=admin.READ)
            ),
            "TENANT_NOT_FOUND",
            "parent",
        ),
        ("ListApiKeys", admin.ListApiKeysRequest(parent="x"), "FIELD_INVALID", "parent"),
        (
            "RevokeApiKey",
            admin.RevokeApiKeyRequest(name="tenants/default/apiKeys/0123456789abcdef"),
            "API_KEY_NOT_FOUND",
            "name",
        ),
        (
            "RevokeApiKey",
            admin.RevokeApiKeyRequest(name="tenants/default"),
            "FIELD_INVALID",
            "name",
        ),
    ],
)
async def test_bad_calls(
    served: Served, call: str, request_: object, reason: str, field: str
) -> None:
    refusal = await refused(served.as_operator(getattr(served.admin, call), request_))
    assert (refusal.reason, refusal.field) == (reason, field)


async def test_a_tenants_admin_manages_its_own_tenant_only(served: Served) -> None:
    tenant = await new_tenant(served, "acme")
    caller, key = await admin_of(served, tenant.name)
    listed = await caller(served.admin.ListTenants, admin.ListTenantsRequest())
    assert names_of(listed.tenants) == [tenant.name]
    await caller(served.admin.GetUsage, admin.GetUsageRequest(name=tenant.name))
    own = await caller(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent=tenant.name, api_key=admin.ApiKey(scope=admin.READ)),
    )
    keys = await caller(served.admin.ListApiKeys, admin.ListApiKeysRequest(parent=tenant.name))
    assert set(names_of(keys.api_keys)) == {key.name, own.api_key.name}
    operator_key = (
        await served.as_operator(
            served.admin.ListApiKeys, admin.ListApiKeysRequest(parent="tenants/default")
        )
    ).api_keys[0]
    foreign: list[tuple[Any, Any]] = [
        (served.admin.GetTenant, admin.GetTenantRequest(name="tenants/default")),
        (served.admin.GetUsage, admin.GetUsageRequest(name="tenants/default")),
        (served.admin.ListApiKeys, admin.ListApiKeysRequest(parent="tenants/default")),
        (served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=operator_key.name)),
        (
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ)
            ),
        ),
    ]
    for method, request in foreign:
        assert (await refused(caller(method, request))).reason == "TENANT_NOT_FOUND"
    for method, request in (
        (served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="more")),
        (served.admin.DeleteTenant, admin.DeleteTenantRequest(name=tenant.name)),
    ):
        assert (await refused(caller(method, request))).reason == "SCOPE_INSUFFICIENT"


async def test_keys_made_by_admins_are_no_operators(served: Served) -> None:
    caller, _ = await admin_of(served, "tenants/default")
    refusal = await refused(
        caller(served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="more"))
    )
    assert refusal.reason == "SCOPE_INSUFFICIENT"


async def test_a_deleted_tenant_takes_everything_with_it(served: Served) -> None:
    tenant = await new_tenant(served, "doomed")
    caller, _ = await admin_of(served, tenant.name)
    app = served.server.application
    uid = (await app.catalog.get_tenant("doomed")).uid
    for index in range(3):
        memory = await caller(
            served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id=f"memory-{index}")
        )
        await caller(
            served.memories.AppendTurns,
            pb.AppendTurnsRequest(memory=memory.name, turns=turns("must go")),
        )
    kept = await served.create("kept")
    await served.append(kept.name, "stays")
    assert app.data.tenant(uid).exists()
    await served.as_operator(served.admin.DeleteTenant, admin.DeleteTenantRequest(name=tenant.name))
    assert not app.data.tenant(uid).exists()
    refusal = await refused(caller(served.memories.ListMemories, pb.ListMemoriesRequest()))
    assert refusal.reason == "CREDENTIAL_INVALID"
    refusal = await refused(
        served.as_operator(served.admin.GetTenant, admin.GetTenantRequest(name=tenant.name))
    )
    assert refusal.reason == "TENANT_NOT_FOUND"
    assert await served.texts(kept.name) == ["stays"]
    # The name is free; a new tenant of that name starts empty.
    await new_tenant(served, "doomed")
    fresh, _ = await admin_of(served, tenant.name)
    page = await fresh(served.memories.ListMemories, pb.ListMemoriesRequest())
    assert not page.memories


async def test_usage_counts_what_a_tenant_holds(served: Served) -> None:
    memory = await served.create("counted")
    await served.append(memory.name, "12345", "678")
    usage = await served.as_operator(
        served.admin.GetUsage, admin.GetUsageRequest(name="tenants/default")
    )
    assert usage.name == "tenants/default"
    assert (usage.memories, usage.documents, usage.text_bytes) == (1, 2, 8)


async def test_keys_are_listed_without_secrets(served: Served) -> None:
    reply = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent="tenants/default",
            api_key=admin.ApiKey(scope=admin.READ, display_name="reader"),
        ),
    )
    assert reply.api_key.display_name == "reader"
    assert reply.secret.startswith("msk_")
    listed = await served.as_operator(
        served.admin.ListApiKeys, admin.ListApiKeysRequest(parent="tenants/default", page_size=1)
    )
    assert listed.api_keys == [reply.api_key]
    assert reply.secret not in str(listed)
