"""The admin service: tenants, API keys, usage.

The gate has already asked for the ADMIN scope. Which tenants a key may manage
is decided here: its own, or all of them for an operator's key. A tenant that
the caller may not manage answers as a missing one.
"""

from __future__ import annotations

import logging
import time

from memsvc import errors, names, validation
from memsvc.api.memories import cursor
from memsvc.application import Application
from memsvc.auth import Principal, current_principal
from memsvc.convert import api_key_to_wire, scope_from_wire, tenant_to_wire, usage_to_wire
from memsvc.v1 import admin_service_pb2 as pb
from storage.catalog import AlreadyExistsError, ConflictError, MemoryState, NotFoundError, TenantRow

log = logging.getLogger(__name__)

_OPERATOR = "operator"


class AdminHandler:
    """Tenants, keys and usage."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self._catalog = application.catalog

    async def create_tenant(self, request: pb.CreateTenantRequest) -> pb.Tenant:
        """Operator only."""
        _require_operator()
        tenant_id = names.check_id("tenant_id", request.tenant_id)
        display_name = validation.check_display_name(
            "tenant.display_name", request.tenant.display_name
        )
        try:
            row = await self._catalog.create_tenant(tenant_id, display_name)
        except AlreadyExistsError as error:
            raise errors.already_exists("tenant_id") from error
        await self._audit(row, "CreateTenant", names.tenant_name(tenant_id))
        return tenant_to_wire(row)

    async def get_tenant(self, request: pb.GetTenantRequest) -> pb.Tenant:
        """The caller's own, or any for the operator."""
        return tenant_to_wire(await self._tenant("name", request.name))

    async def list_tenants(self, request: pb.ListTenantsRequest) -> pb.ListTenantsResponse:
        """Newest first. A key that is not the operator's sees its own tenant."""
        caller = current_principal()
        binding = (caller.tenant_uid, "ListTenants", str(caller.operator))
        limit = validation.check_page_size(request.page_size)
        position = self._app.page_tokens.open(binding, request.page_token)
        if not caller.operator:
            own = await self._catalog.get_tenant(caller.tenant_id)
            return pb.ListTenantsResponse(tenants=[tenant_to_wire(own)])
        rows, after = await self._catalog.list_tenants(limit, cursor(position))
        return pb.ListTenantsResponse(
            tenants=[tenant_to_wire(row) for row in rows],
            next_page_token=self._app.page_tokens.issue(binding, after) if after else "",
        )

    async def delete_tenant(self, request: pb.DeleteTenantRequest) -> None:
        """Operator only. Keys stop first, then memories go, then the tenant.

        Repeating the call after a failure goes on where it stopped.
        """
        caller = _require_operator()
        tenant = await self._tenant("name", request.name)
        if tenant.uid == caller.tenant_uid:
            raise errors.field_invalid("name", "must not be the tenant of the calling key")
        self._app.authenticator.close_tenant(tenant.uid)
        while not await self._delete_contents(tenant):
            log.info("a call in flight made a memory in a tenant being deleted")
        await self._audit(tenant, "DeleteTenant", names.tenant_name(tenant.tenant_id))

    async def create_api_key(self, request: pb.CreateApiKeyRequest) -> pb.CreateApiKeyResponse:
        """The secret is in this reply and nowhere else."""
        wanted = request.api_key
        scope = scope_from_wire("api_key.scope", wanted.scope)
        display_name = validation.check_display_name("api_key.display_name", wanted.display_name)
        expires_us = _expiry_us(wanted)
        tenant = await self._tenant("parent", request.parent)
        minted = self._app.authenticator.mint()
        try:
            row = await self._catalog.create_api_key(
                minted.key_id,
                tenant.uid,
                display_name,
                scope,
                operator=False,
                digest=minted.digest,
                expires_us=expires_us,
            )
        except NotFoundError as error:
            raise errors.tenant_not_found("parent") from error
        wire = api_key_to_wire(row)
        await self._audit(tenant, "CreateApiKey", wire.name)
        return pb.CreateApiKeyResponse(api_key=wire, secret=minted.credential)

    async def list_api_keys(self, request: pb.ListApiKeysRequest) -> pb.ListApiKeysResponse:
        """Newest first, revoked ones included."""
        limit = validation.check_page_size(request.page_size)
        tenant = await self._tenant("parent", request.parent)
        binding = (current_principal().tenant_uid, "ListApiKeys", tenant.uid)
        position = self._app.page_tokens.open(binding, request.page_token)
        rows, after = await self._catalog.list_api_keys(tenant.uid, limit, cursor(position))
        return pb.ListApiKeysResponse(
            api_keys=[api_key_to_wire(row) for row in rows],
            next_page_token=self._app.page_tokens.issue(binding, after) if after else "",
        )

    async def revoke_api_key(self, request: pb.RevokeApiKeyRequest) -> pb.ApiKey:
        """At once: calls that come after the reply are refused."""
        tenant_id, key_id = names.parse_api_key("name", request.name)
        tenant = await self._tenant("name", names.tenant_name(tenant_id))
        try:
            row = await self._catalog.revoke_api_key(tenant.uid, key_id)
        except NotFoundError as error:
            raise errors.api_key_not_found() from error
        self._app.authenticator.forget(key_id)
        await self._audit(tenant, "RevokeApiKey", request.name)
        return api_key_to_wire(row)

    async def get_usage(self, request: pb.GetUsageRequest) -> pb.TenantUsage:
        """What a tenant holds and has used."""
        tenant = await self._tenant("name", request.name)
        return usage_to_wire(tenant.tenant_id, await self._catalog.usage(tenant.uid))

    async def _tenant(self, field: str, name: str) -> TenantRow:
        tenant_id = names.parse_tenant(field, name)
        caller = current_principal()
        if not caller.operator and tenant_id != caller.tenant_id:
            raise errors.tenant_not_found(field)
        try:
            return await self._catalog.get_tenant(tenant_id)
        except NotFoundError as error:
            raise errors.tenant_not_found(field) from error

    async def _delete_contents(self, tenant: TenantRow) -> bool:
        """False when a call that was in flight has added a memory meanwhile."""
        await self._delete_memories(tenant)
        await self._app.workers.evict(tenant.uid, "")
        await self._app.stores.remove(tenant.uid)
        try:
            await self._catalog.delete_tenant(tenant.uid)
        except ConflictError:
            return False
        except NotFoundError as error:
            raise errors.tenant_not_found() from error
        return True

    async def _delete_memories(self, tenant: TenantRow) -> None:
        """Also those whose deletion a crash cut short."""
        for row in await self._catalog.memories_in_state(MemoryState.DELETING):
            if row.tenant_uid == tenant.uid:
                await self._app.writes.purge_memory(row)
        while True:
            rows, _ = await self._catalog.list_memories(tenant.uid, validation.MAX_PAGE, None)
            if not rows:
                return
            for row in rows:
                await self._app.writes.delete_memory(row, None)

    async def _audit(self, tenant: TenantRow, action: str, resource: str) -> None:
        await self._catalog.audit(tenant.uid, current_principal().key_id, action, resource)


def _require_operator() -> Principal:
    caller = current_principal()
    if not caller.operator:
        raise errors.scope_insufficient(_OPERATOR)
    return caller


def _expiry_us(wanted: pb.ApiKey) -> int | None:
    if not wanted.HasField("expire_time"):
        return None
    moment = validation.check_time("api_key.expire_time", wanted.expire_time)
    if moment.timestamp() <= time.time():
        raise errors.field_invalid("api_key.expire_time", "must lie in the future")
    return round(moment.timestamp() * 1_000_000)
