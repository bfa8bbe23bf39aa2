"""Tenants, API keys and usage. Needs a key with the ADMIN scope."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from memsvc.client import administration, convert
from memsvc.client.administration import (
    ApiKey,
    AuditEvent,
    CreatedApiKey,
    DeletionReceipt,
    RotatedApiKey,
    Scope,
    Tenant,
    TenantUsage,
)
from memsvc.client.names import memory_name, model_name, tenant_name
from memsvc.client.quotas import Quotas, quotas_from_wire, quotas_name, quotas_to_wire
from memsvc.client.serving import Worker, worker
from memsvc.client.timeouts import CALL_S
from memsvc.client.transport import Transport
from memsvc.client.types import Page
from memsvc.v1 import admin_service_pb2 as service
from memsvc.v1.admin_service_pb2_grpc import AdminServiceStub

if TYPE_CHECKING:
    from memsvc.v1.admin_service_pb2_grpc import AdminServiceAsyncStub


class AsyncAdmin:
    """Administration of a tenant, or of all with the operator's key.

    What makes something new is never retried: the admin service takes no request_id.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub: AdminServiceAsyncStub = AdminServiceStub(transport.channel)

    async def create_tenant(
        self, tenant_id: str = "", *, display_name: str = "", timeout_s: float | None = CALL_S
    ) -> Tenant:
        """Operator only. Raises AlreadyExistsError."""
        request = service.CreateTenantRequest(
            tenant=service.Tenant(display_name=display_name), tenant_id=tenant_id
        )
        call = self._stub.CreateTenant
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=False)
        return administration.tenant(reply)

    async def get_tenant(self, tenant: str, *, timeout_s: float | None = CALL_S) -> Tenant:
        """Raises NotFoundError."""
        request = service.GetTenantRequest(name=tenant_name(tenant))
        call = self._stub.GetTenant
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return administration.tenant(reply)

    async def update_tenant(
        self,
        tenant: str,
        *,
        display_name: str | None = None,
        default_model: str | None = None,
        timeout_s: float | None = CALL_S,
    ) -> Tenant:
        """Changes what is given. default_model: for memories without one of their own, each of
        which switches when it is encoded; empty for the server's. Raises NotFoundError.
        """
        given = {"display_name": display_name, "default_model": default_model}
        paths = [path for path, value in given.items() if value is not None]
        request = service.UpdateTenantRequest(
            tenant=service.Tenant(
                name=tenant_name(tenant),
                display_name=display_name or "",
                default_model=model_name(default_model or ""),
            ),
            update_mask=FieldMask(paths=paths),
        )
        call = self._stub.UpdateTenant
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return administration.tenant(reply)

    async def list_workers(self, *, timeout_s: float | None = CALL_S) -> tuple[Worker, ...]:
        """The workers that the server knows. Operator only."""
        call = self._stub.ListWorkers
        request = service.ListWorkersRequest()
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return tuple(worker(message) for message in reply.workers)

    async def list_tenants(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = CALL_S
    ) -> Page[Tenant]:
        """One page, newest first."""
        request = service.ListTenantsRequest(page_size=page_size, page_token=page_token)
        call = self._stub.ListTenants
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(tuple(administration.tenant(t) for t in reply.tenants), reply.next_page_token)

    async def iterate_tenants(self, *, page_size: int = 0) -> AsyncGenerator[Tenant, None]:
        """All tenants, newest first."""
        page = await self.list_tenants(page_size=page_size)
        while True:
            for tenant in page.items:
                yield tenant
            if not page.next_page_token:
                return
            page = await self.list_tenants(page_size=page_size, page_token=page.next_page_token)

    async def delete_tenant(self, tenant: str, *, timeout_s: float | None = CALL_S) -> None:
        """Operator only. Deletes the tenant with everything in it."""
        request = service.DeleteTenantRequest(name=tenant_name(tenant))
        call = self._stub.DeleteTenant
        await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=False)

    async def create_api_key(
        self,
        tenant: str,
        scope: Scope,
        *,
        display_name: str = "",
        expire_time: datetime | None = None,
        memories: Iterable[str] = (),
        timeout_s: float | None = CALL_S,
    ) -> CreatedApiKey:
        """Makes a key; its secret is in this reply and nowhere else.

        memories: those that the key reaches, which must exist; none: all of the tenant's.
        """
        request = service.CreateApiKeyRequest(
            parent=tenant_name(tenant),
            api_key=service.ApiKey(
                display_name=display_name,
                scope=administration.scope_to_wire(scope),
                expire_time=convert.timestamp(expire_time),
                memories=[memory_name(memory) for memory in memories],
            ),
        )
        call = self._stub.CreateApiKey
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=False)
        return CreatedApiKey(administration.api_key(reply.api_key), reply.secret)

    async def list_api_keys(
        self,
        tenant: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Page[ApiKey]:
        """One page, newest first, revoked ones included."""
        request = service.ListApiKeysRequest(
            parent=tenant_name(tenant), page_size=page_size, page_token=page_token
        )
        call = self._stub.ListApiKeys
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(tuple(administration.api_key(k) for k in reply.api_keys), reply.next_page_token)

    async def iterate_api_keys(
        self, tenant: str, *, page_size: int = 0
    ) -> AsyncGenerator[ApiKey, None]:
        """All keys of a tenant, newest first, revoked ones included."""
        page = await self.list_api_keys(tenant, page_size=page_size)
        while True:
            for key in page.items:
                yield key
            if not page.next_page_token:
                return
            page = await self.list_api_keys(
                tenant, page_size=page_size, page_token=page.next_page_token
            )

    async def revoke_api_key(self, name: str, *, timeout_s: float | None = CALL_S) -> ApiKey:
        """name: "tenants/{tenant}/apiKeys/{key}". Revoking twice is no error."""
        request = service.RevokeApiKeyRequest(name=name)
        call = self._stub.RevokeApiKey
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return administration.api_key(reply)

    async def rotate_api_key(
        self,
        name: str,
        *,
        grace: timedelta | None = None,
        expire_time: datetime | None = None,
        timeout_s: float | None = CALL_S,
    ) -> RotatedApiKey:
        """Makes a key of the same rights; the old one ends after `grace` (None: 24 hours).

        expire_time: of the new one; None: as long a life as the old one was made for.
        """
        request = service.RotateApiKeyRequest(name=name, expire_time=convert.timestamp(expire_time))
        if grace is not None:
            request.grace.FromTimedelta(grace)
        call = self._stub.RotateApiKey
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=False)
        return RotatedApiKey(
            administration.api_key(reply.api_key),
            reply.secret,
            administration.api_key(reply.previous),
        )

    async def usage(self, tenant: str, *, timeout_s: float | None = CALL_S) -> TenantUsage:
        """What a tenant holds and has used."""
        request = service.GetUsageRequest(name=tenant_name(tenant))
        call = self._stub.GetUsage
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return administration.usage(reply)

    async def quotas(self, tenant: str, *, timeout_s: float | None = CALL_S) -> Quotas:
        """What a tenant may use."""
        request = service.GetTenantQuotasRequest(name=quotas_name(tenant))
        call = self._stub.GetTenantQuotas
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return quotas_from_wire(reply)

    async def set_quotas(
        self, tenant: str, limits: Mapping[str, int], *, timeout_s: float | None = CALL_S
    ) -> Quotas:
        """Operator only. limits: by name; 0 goes back to what the server's settings say."""
        request = quotas_to_wire(tenant, limits)
        call = self._stub.UpdateTenantQuotas
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return quotas_from_wire(reply)

    async def list_audit_events(
        self,
        tenant: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Page[AuditEvent]:
        """One page of a tenant's audit trail, newest first."""
        request = service.ListAuditEventsRequest(
            parent=tenant_name(tenant), page_size=page_size, page_token=page_token
        )
        call = self._stub.ListAuditEvents
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(
            tuple(administration.audit_event(e) for e in reply.audit_events), reply.next_page_token
        )

    async def iterate_audit_events(
        self, tenant: str, *, page_size: int = 0
    ) -> AsyncGenerator[AuditEvent, None]:
        """All of a tenant's audit trail, newest first."""
        page = await self.list_audit_events(tenant, page_size=page_size)
        while True:
            for event in page.items:
                yield event
            if not page.next_page_token:
                return
            page = await self.list_audit_events(
                tenant, page_size=page_size, page_token=page.next_page_token
            )

    async def deletion_receipt(
        self, name: str, *, timeout_s: float | None = CALL_S
    ) -> DeletionReceipt:
        """name: "tenants/{tenant}/deletionReceipts/{id}"."""
        request = service.GetDeletionReceiptRequest(name=name)
        call = self._stub.GetDeletionReceipt
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return administration.deletion_receipt(reply)

    async def list_deletion_receipts(
        self,
        tenant: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = CALL_S,
    ) -> Page[DeletionReceipt]:
        """One page of a tenant's deletion receipts, newest first."""
        request = service.ListDeletionReceiptsRequest(
            parent=tenant_name(tenant), page_size=page_size, page_token=page_token
        )
        call = self._stub.ListDeletionReceipts
        reply = await self._transport.unary(call, request, timeout_s=timeout_s, repeatable=True)
        return Page(
            tuple(map(administration.deletion_receipt, reply.deletion_receipts)),
            reply.next_page_token,
        )

    async def iterate_deletion_receipts(
        self, tenant: str, *, page_size: int = 0
    ) -> AsyncGenerator[DeletionReceipt, None]:
        """All of a tenant's deletion receipts, newest first."""
        page = await self.list_deletion_receipts(tenant, page_size=page_size)
        while True:
            for receipt in page.items:
                yield receipt
            if not page.next_page_token:
                return
            page = await self.list_deletion_receipts(
                tenant, page_size=page_size, page_token=page.next_page_token
            )
