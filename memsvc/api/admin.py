"""The admin service: tenants and their usage.

The gate has already asked for the ADMIN scope; which tenants a key may manage is
said in administering.
"""

from __future__ import annotations

from contextlib import suppress

from memsvc import errors, names, validation
from memsvc.api.administering import find_tenant, require_operator
from memsvc.api.memories import cursor
from memsvc.application import Application
from memsvc.convert import tenant_to_wire, usage_to_wire
from memsvc.deletion import DeletionUnfinishedError
from memsvc.principal import current_principal
from memsvc.v1 import admin_service_pb2 as pb
from storage.catalog import (
    AlreadyExistsError,
    MemoryState,
    ModelNotFoundError,
    NotFoundError,
    TenantRow,
)

_UPDATABLE = ("display_name", "default_model")


class AdminHandler:
    """Tenants and usage."""

    def __init__(self, application: Application) -> None:
        self._app = application
        self._catalog = application.catalog

    async def create_tenant(self, request: pb.CreateTenantRequest) -> pb.Tenant:
        """Operator only."""
        require_operator()
        tenant_id = names.check_id("tenant_id", request.tenant_id)
        display_name = validation.check_display_name(
            "tenant.display_name", request.tenant.display_name
        )
        try:
            row = await self._catalog.create_tenant(tenant_id, display_name)
        except AlreadyExistsError as error:
            raise errors.already_exists("tenant_id") from error
        return tenant_to_wire(row)

    async def get_tenant(self, request: pb.GetTenantRequest) -> pb.Tenant:
        """The caller's own, or any for the operator."""
        return tenant_to_wire(await find_tenant(self._app, "name", request.name))

    async def update_tenant(self, request: pb.UpdateTenantRequest) -> pb.Tenant:
        """Field masks after AIP-134: without one, every field that is set."""
        wanted, paths = request.tenant, list(request.update_mask.paths)
        validation.check_mask("update_mask", paths, _UPDATABLE)
        paths = paths or [path for path in _UPDATABLE if getattr(wanted, path)]
        display_name = validation.check_display_name("tenant.display_name", wanted.display_name)
        model_id = ""
        if wanted.default_model:
            model_id = names.parse_model("tenant.default_model", wanted.default_model)
        tenant = await find_tenant(self._app, "tenant.name", wanted.name, to_change=True)
        try:
            row = await self._catalog.update_tenant(
                tenant.tenant_id,
                display_name=display_name if "display_name" in paths else None,
                default_model_id=model_id if "default_model" in paths else None,
                uid=tenant.uid,
            )
        except ModelNotFoundError as error:
            raise errors.model_not_found("tenant.default_model") from error
        except NotFoundError as error:
            raise errors.tenant_not_found("tenant.name") from error
        finally:  # Also where the caller left at the commit.
            self._app.encoding.wake()
        return tenant_to_wire(row)

    async def list_tenants(self, request: pb.ListTenantsRequest) -> pb.ListTenantsResponse:
        """Newest first. A key that is not the operator's sees its own tenant."""
        caller = current_principal()
        binding = (caller.tenant_uid, "ListTenants", str(caller.operator))
        limit = validation.check_page_size(request.page_size)
        position = self._app.page_tokens.open(binding, request.page_token)
        if not caller.operator:
            own = await find_tenant(self._app, "", names.tenant_name(caller.tenant_id))
            return pb.ListTenantsResponse(tenants=[tenant_to_wire(own)])
        rows, after = await self._catalog.list_tenants(limit, cursor(position))
        return pb.ListTenantsResponse(
            tenants=[tenant_to_wire(row) for row in rows],
            next_page_token=self._app.page_tokens.issue(binding, after) if after else "",
        )

    async def delete_tenant(self, request: pb.DeleteTenantRequest) -> None:
        """Operator only. Keys stop first, then memories go, then the tenant.

        It goes on when its caller leaves. After a failure the call may be repeated; after a
        crash the next start finishes it.
        """
        caller = require_operator()
        tenant = await find_tenant(self._app, "name", request.name, to_change=True)
        if tenant.uid == caller.tenant_uid:
            raise errors.field_invalid("name", "must not be the tenant of the calling key")

        async def work() -> None:
            # Another call may have done it while this one waited.
            now = await find_tenant(self._app, "name", request.name)
            if now.uid != tenant.uid:
                raise errors.tenant_not_found()
            await self._delete(tenant)

        # No memory has an empty id: this is the lock of the tenant itself.
        await self._app.writes.locks.run_whole(tenant.uid, "", work)

    async def get_usage(self, request: pb.GetUsageRequest) -> pb.TenantUsage:
        """What a tenant holds and has used."""
        tenant = await find_tenant(self._app, "name", request.name)
        return usage_to_wire(tenant.tenant_id, await self._catalog.usage(tenant.uid))

    async def _delete(self, tenant: TenantRow) -> None:
        """From the mark on no memory is added, so none is left when all were deleted."""
        self._app.authenticator.close_tenant(tenant.uid)
        await self._catalog.begin_delete_tenant(tenant.uid)
        await self._delete_memories(tenant)
        await self._app.deletions.purge_tenant(tenant.uid)
        try:
            await self._catalog.delete_tenant(tenant.uid)
        except NotFoundError as error:
            raise errors.tenant_not_found() from error
        self._app.limiter.forget(tenant.uid)

    async def _delete_memories(self, tenant: TenantRow) -> None:
        """Also those whose deletion another call began, which is waited for, or a crash cut
        short. What a store that is damaged, say, does not let go of goes with the store.
        """
        while True:
            rows, _ = await self._catalog.list_memories(tenant.uid, validation.MAX_PAGE, None)
            if not rows:
                break
            for row in rows:
                # Not found: another call was faster.
                with suppress(DeletionUnfinishedError, NotFoundError):
                    await self._app.writes.delete_memory(row, None)
        for row in await self._catalog.memories_in_state(MemoryState.DELETING, tenant.uid):
            with suppress(DeletionUnfinishedError):
                await self._app.writes.finish_deletion(row)
