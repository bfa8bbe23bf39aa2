"""What the handlers of the admin service share: whom the caller may manage.

A tenant's admin manages its own tenant, the operator all of them. A tenant that the
caller may not manage answers as a missing one.
"""

from __future__ import annotations

from memsvc import errors, names
from memsvc.application import Application
from memsvc.principal import Principal, current_principal
from storage.catalog import NotFoundError, TenantRow

_OPERATOR = "operator"


def require_operator() -> Principal:
    """The caller, who is the operator. Raises SCOPE_INSUFFICIENT."""
    caller = current_principal()
    if not caller.operator:
        raise errors.scope_insufficient(_OPERATOR)
    return caller


async def find_tenant(
    application: Application, field: str, name: str, *, to_change: bool = False
) -> TenantRow:
    """The tenant of that name, if the caller may manage it. Raises TENANT_NOT_FOUND.

    to_change: the server that leads it must make the change, as it keeps in mind what it has
    read of keys, limits and memories. Also raises SERVED_ELSEWHERE then.
    """
    tenant_id, caller = names.parse_tenant(field, name), current_principal()
    if not caller.operator and tenant_id != caller.tenant_id:
        raise errors.tenant_not_found(field)
    try:
        tenant = await application.catalog.get_tenant(tenant_id)
    except NotFoundError as error:
        raise errors.tenant_not_found(field) from error
    # The caller's own may have been deleted meanwhile and another one taken its name.
    if not caller.operator and tenant.uid != caller.tenant_uid:
        raise errors.tenant_not_found(field)
    if to_change:
        await application.leases.require(tenant.uid)
    return tenant
