"""Quotas through the wire: who sets them, what they refuse, what a refusal says."""

from __future__ import annotations

import pytest
from google.protobuf import field_mask_pb2

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.support.served import Caller, Serve, Served, refused, turns

DEFAULT = "tenants/default/quotas"


async def update(
    served: Served, name: str = DEFAULT, mask: tuple[str, ...] = (), **limits: int
) -> admin.TenantQuotas:
    request = admin.UpdateTenantQuotasRequest(
        quotas=admin.TenantQuotas(name=name, limits=admin.QuotaLimits(**limits)),
        update_mask=field_mask_pb2.FieldMask(paths=[f"limits.{path}" for path in mask]),
    )
    reply: admin.TenantQuotas = await served.as_operator(served.admin.UpdateTenantQuotas, request)
    return reply


async def get(served: Served, caller: Caller, name: str = DEFAULT) -> admin.TenantQuotas:
    request = admin.GetTenantQuotasRequest(name=name)
    reply: admin.TenantQuotas = await caller(served.admin.GetTenantQuotas, request)
    return reply


async def tenant_key(served: Served, tenant: str, scope: int = admin.ADMIN) -> Caller:
    await served.as_operator(served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id=tenant))
    request = admin.CreateApiKeyRequest(
        parent=f"tenants/{tenant}",
        api_key=admin.ApiKey(scope=scope),  # type: ignore[arg-type]  # an enum's number
    )
    reply = await served.as_operator(served.admin.CreateApiKey, request)
    return Caller(reply.secret)


async def test_quotas_are_set_shown_and_taken_away(start: Serve) -> None:
    async with start(max_documents_per_memory=50) as served:
        quotas = await get(served, served.as_operator)
        assert quotas.name == DEFAULT
        assert quotas.limits == admin.QuotaLimits()
        assert quotas.effective.max_documents_per_memory == 50
        assert quotas.effective.stream_seconds == 86_400
        changed = await update(served, requests_per_minute=90, max_documents_per_memory=2)
        assert changed.limits.requests_per_minute == 90
        assert changed.effective.max_documents_per_memory == 2
        changed = await update(served, mask=("max_documents_per_memory",), requests_per_minute=1)
        assert changed.limits.requests_per_minute == 90
        assert changed.limits.max_documents_per_memory == 0
        assert changed.effective.max_documents_per_memory == 50
    async with start(max_documents_per_memory=50) as served:
        assert await get(served, served.as_operator) == changed


async def test_they_apply_from_the_next_call_on_and_to_one_tenant(served: Served) -> None:
    memory = await served.create("here")
    other = await tenant_key(served, "other")
    await update(served, "tenants/other/quotas", concurrent_calls=5, requests_per_minute=2)
    await served.append(memory.name, "one")
    await other(served.memories.ListMemories, pb.ListMemoriesRequest())
    await other(served.memories.ListMemories, pb.ListMemoriesRequest())
    answer = await refused(other(served.memories.ListMemories, pb.ListMemoriesRequest()))
    assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert answer.metadata == {"quota": "requests_per_minute", "limit": "2"}
    assert answer.retry_s is not None
    assert 20 < answer.retry_s <= 30
    await served.append(memory.name, "two")
    await update(served, "tenants/other/quotas", requests_per_minute=1000)
    await other(served.memories.ListMemories, pb.ListMemoriesRequest())


async def test_what_is_held_is_bounded_per_tenant(served: Served) -> None:
    memory = await served.create("small")
    await update(served, max_documents_per_memory=2, max_memories_per_tenant=1)
    await served.append(memory.name, "one", "two")
    answer = await refused(served.append(memory.name, "three"))
    assert answer.metadata == {"quota": "max_documents_per_memory", "limit": "2"}
    assert answer.retry_s is None
    answer = await refused(served.create("second"))
    assert answer.metadata == {"quota": "max_memories_per_tenant", "limit": "1"}
    await update(served, max_text_bytes_per_memory=8, max_documents_per_memory=9)
    answer = await refused(served.append(memory.name, "three"))
    assert answer.metadata == {"quota": "max_text_bytes_per_memory", "limit": "8"}


async def test_bytes_count_both_ways(served: Served) -> None:
    memory = await served.create("bytes")
    await update(served, bytes_per_minute=1000)
    await served.append(memory.name, "x" * 2000)
    answer = await refused(served.append(memory.name, "y"))
    assert answer.metadata["quota"] == "bytes_per_minute"
    assert answer.retry_s is not None
    assert 55 < answer.retry_s < 125


async def test_only_the_operator_sets_them(served: Served) -> None:
    other = await tenant_key(served, "other")
    assert (await get(served, other, "tenants/other/quotas")).effective.stream_seconds
    request = admin.UpdateTenantQuotasRequest(
        quotas=admin.TenantQuotas(
            name="tenants/other/quotas", limits=admin.QuotaLimits(requests_per_minute=10**9)
        )
    )
    answer = await refused(other(served.admin.UpdateTenantQuotas, request))
    assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "SCOPE_INSUFFICIENT")
    foreign = admin.GetTenantQuotasRequest(name=DEFAULT)
    missing = admin.GetTenantQuotasRequest(name="tenants/nobody/quotas")
    answers = [await refused(other(served.admin.GetTenantQuotas, r)) for r in (foreign, missing)]
    assert answers[0] == answers[1]
    assert answers[0].reason == "TENANT_NOT_FOUND"


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (admin.UpdateTenantQuotasRequest(), "FIELD_REQUIRED", "quotas.name"),
        (
            admin.UpdateTenantQuotasRequest(quotas=admin.TenantQuotas(name="tenants/default")),
            "FIELD_INVALID",
            "quotas.name",
        ),
        (
            admin.UpdateTenantQuotasRequest(
                quotas=admin.TenantQuotas(
                    name=DEFAULT, limits=admin.QuotaLimits(concurrent_calls=-1)
                )
            ),
            "FIELD_INVALID",
            "quotas.limits.concurrent_calls",
        ),
        (
            admin.UpdateTenantQuotasRequest(
                quotas=admin.TenantQuotas(
                    name=DEFAULT, limits=admin.QuotaLimits(bytes_per_minute=10**15 + 1)
                )
            ),
            "FIELD_INVALID",
            "quotas.limits.bytes_per_minute",
        ),
        (
            admin.UpdateTenantQuotasRequest(
                quotas=admin.TenantQuotas(name=DEFAULT),
                update_mask=field_mask_pb2.FieldMask(paths=["limits"]),
            ),
            "FIELD_INVALID",
            "update_mask",
        ),
        (
            admin.UpdateTenantQuotasRequest(
                quotas=admin.TenantQuotas(name="tenants/nobody/quotas")
            ),
            "TENANT_NOT_FOUND",
            "quotas.name",
        ),
    ],
)
async def test_wrong_updates(
    served: Served, request_: admin.UpdateTenantQuotasRequest, reason: str, field: str
) -> None:
    answer = await refused(served.as_operator(served.admin.UpdateTenantQuotas, request_))
    assert (answer.reason, answer.field) == (reason, field)


async def test_one_tenant_cannot_take_every_place(start: Serve) -> None:
    """A watcher per place: the last fifth stays for others."""
    async with start(max_concurrent_calls=10) as served:
        other = await tenant_key(served, "other")
        memory = await served.create("watched")
        watching = []
        for _ in range(8):
            call = served.as_operator(
                served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory.name)
            )
            await call.read()
            watching.append(call)
        answer = await refused(served.create("one-more"))
        assert (answer.reason, answer.metadata) == ("OVERLOADED", {})
        assert answer.retry_s
        await other(served.memories.ListMemories, pb.ListMemoriesRequest())
        for call in watching:
            call.cancel()


async def test_tokens_are_counted_by_what_is_encoded(served: Served) -> None:
    memory = await served.create("tokens")
    await update(served, tokens_per_minute=100)
    uid = next(iter(served.server.application.limiter._tenants))
    served.server.application.limiter.spend_tokens(uid, 101)
    request = pb.AppendTurnsRequest(memory=memory.name, turns=turns("more"))
    answer = await refused(served.as_operator(served.memories.AppendTurns, request))
    assert answer.metadata["quota"] == "tokens_per_minute"
    await served.texts(memory.name)
