"""What a tenant may use, as the client shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memsvc.client.names import tenant_name
from memsvc.v1 import admin_service_pb2 as service

#: Names of the limits, as QUOTA_EXCEEDED has them in its metadata.
QUOTA_NAMES = tuple(field.name for field in service.QuotaLimits.DESCRIPTOR.fields)


@dataclass(frozen=True)
class Quotas:
    """Limits by name. own: the tenant's, where it has any. effective: what applies; 0: no limit."""

    name: str
    own: Mapping[str, int]
    effective: Mapping[str, int]


def quotas_name(tenant: str) -> str:
    """ "tenants/{tenant}/quotas"."""
    return f"{tenant_name(tenant)}/quotas"


def quotas_from_wire(message: service.TenantQuotas) -> Quotas:
    """Every limit that is set."""

    def limits(wire: service.QuotaLimits) -> dict[str, int]:
        return {name: getattr(wire, name) for name in QUOTA_NAMES}

    own = {name: value for name, value in limits(message.limits).items() if value}
    return Quotas(message.name, own, limits(message.effective))


def quotas_to_wire(tenant: str, limits: Mapping[str, int]) -> service.UpdateTenantQuotasRequest:
    """Exactly the limits that are given. Raises ValueError for a name that is none."""
    unknown = limits.keys() - set(QUOTA_NAMES)
    if unknown:
        raise ValueError(f"no such quota: {', '.join(sorted(unknown))}")
    request = service.UpdateTenantQuotasRequest()
    request.quotas.name = quotas_name(tenant)
    for name, value in limits.items():
        setattr(request.quotas.limits, name, value)
        request.update_mask.paths.append(f"limits.{name}")
    return request
