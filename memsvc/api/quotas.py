"""GetTenantQuotas and UpdateTenantQuotas."""

from __future__ import annotations

from collections.abc import Mapping

from memsvc import errors, names, validation
from memsvc.api.administering import find_tenant, require_operator
from memsvc.application import Application
from memsvc.limits import QUOTAS
from memsvc.v1 import admin_service_pb2 as pb
from storage.catalog import NotFoundError, TenantRow

_MOST = 10**15
_PATHS = tuple(f"limits.{name}" for name in QUOTAS)


class QuotasHandler:
    """What tenants may use."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def get(self, request: pb.GetTenantQuotasRequest) -> pb.TenantQuotas:
        """The caller's own tenant's, or any for the operator."""
        return await self._wire(await self._tenant("name", request.name))

    async def update(self, request: pb.UpdateTenantQuotasRequest) -> pb.TenantQuotas:
        """Operator only: a tenant does not set its own limits."""
        require_operator()
        changes = _changes(request)
        tenant = await self._tenant("quotas.name", request.quotas.name, to_change=True)
        try:
            await self._app.catalog.set_quotas(tenant.uid, changes)
        except NotFoundError as error:
            raise errors.tenant_not_found("quotas.name") from error
        finally:  # Also where the caller left at the commit.
            self._app.limiter.forget(tenant.uid)
        return await self._wire(tenant)

    async def _tenant(self, field: str, name: str, *, to_change: bool = False) -> TenantRow:
        name = names.tenant_name(names.parse_quotas(field, name))
        return await find_tenant(self._app, field, name, to_change=to_change)

    async def _wire(self, tenant: TenantRow) -> pb.TenantQuotas:
        own = await self._app.catalog.quotas(tenant.uid)
        effective = await self._app.limiter.quotas(tenant.uid)
        return pb.TenantQuotas(
            name=names.quotas_name(tenant.tenant_id),
            limits=pb.QuotaLimits(**{name: own[name] for name in QUOTAS if name in own}),
            effective=pb.QuotaLimits(**{name: getattr(effective, name) for name in QUOTAS}),
        )


def _changes(request: pb.UpdateTenantQuotasRequest) -> Mapping[str, int]:
    """Limits to set by name, checked; 0 takes one away."""
    paths = list(request.update_mask.paths)
    validation.check_mask("update_mask", paths, _PATHS)
    wanted = {name: getattr(request.quotas.limits, name) for name in QUOTAS}
    for name, value in wanted.items():
        validation.check_range(f"quotas.limits.{name}", value, low=0, high=_MOST)
    if paths:
        return {name: value for name, value in wanted.items() if f"limits.{name}" in paths}
    return {name: value for name, value in wanted.items() if value}
