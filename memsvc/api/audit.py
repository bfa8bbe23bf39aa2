"""ListAuditEvents."""

from __future__ import annotations

from memsvc import names, validation
from memsvc.api.administering import find_tenant
from memsvc.application import Application
from memsvc.convert import time_to_wire
from memsvc.principal import current_principal
from memsvc.v1 import admin_service_pb2 as pb
from storage.catalog import AuditRow


class AuditHandler:
    """The audit trails of the tenants that the caller may manage."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def list_audit_events(
        self, request: pb.ListAuditEventsRequest
    ) -> pb.ListAuditEventsResponse:
        """Newest first."""
        limit = validation.check_page_size(request.page_size)
        tenant = await find_tenant(self._app, "parent", request.parent)
        binding = (current_principal().tenant_uid, "ListAuditEvents", tenant.uid)
        position = self._app.page_tokens.open(binding, request.page_token)
        before = int(position[0]) if position else None
        rows, more = await self._app.catalog.list_audit(tenant.uid, limit, before)
        return pb.ListAuditEventsResponse(
            audit_events=[_to_wire(tenant.tenant_id, row) for row in rows],
            next_page_token=self._app.page_tokens.issue(binding, [more]) if more else "",
        )


def _to_wire(tenant_id: str, row: AuditRow) -> pb.AuditEvent:
    return pb.AuditEvent(
        name=f"{names.tenant_name(tenant_id)}/auditEvents/{row.sequence}",
        sequence=row.sequence,
        time=time_to_wire(row.at_us),
        actor=row.actor,
        action=row.action,
        resource=row.resource,
        outcome=row.outcome,
        digest=row.digest.hex(),
    )
