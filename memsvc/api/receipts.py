"""GetDeletionReceipt and ListDeletionReceipts."""

from __future__ import annotations

import asyncio

from memsvc import errors, names, validation
from memsvc.api.administering import find_tenant
from memsvc.application import Application
from memsvc.convert import time_to_wire
from memsvc.principal import current_principal
from memsvc.receipts import Kept, ReceiptError
from memsvc.v1 import admin_service_pb2 as pb


class ReceiptsHandler:
    """The deletion receipts of the tenants that the caller may manage."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def get(self, request: pb.GetDeletionReceiptRequest) -> pb.DeletionReceipt:
        """One of them."""
        tenant_id, receipt_id = names.parse_receipt("name", request.name)
        tenant = await find_tenant(self._app, "name", names.tenant_name(tenant_id))
        try:
            kept = await asyncio.to_thread(self._app.receipts.find, tenant.uid, receipt_id)
        except FileNotFoundError as error:
            raise errors.receipt_not_found() from error
        except ReceiptError as error:
            raise errors.record_corrupt("a deletion receipt") from error
        return _to_wire(tenant_id, kept)

    async def list(
        self, request: pb.ListDeletionReceiptsRequest
    ) -> pb.ListDeletionReceiptsResponse:
        """Newest first."""
        limit = validation.check_page_size(request.page_size)
        tenant = await find_tenant(self._app, "parent", request.parent)
        binding = (current_principal().tenant_uid, "ListDeletionReceipts", tenant.uid)
        position = self._app.page_tokens.open(binding, request.page_token)
        before = str(position[0]) if position else None
        try:
            page, more = await asyncio.to_thread(self._app.receipts.page, tenant.uid, limit, before)
        except ReceiptError as error:
            raise errors.record_corrupt("a deletion receipt") from error
        return pb.ListDeletionReceiptsResponse(
            deletion_receipts=[_to_wire(tenant.tenant_id, kept) for kept in page],
            next_page_token=self._app.page_tokens.issue(binding, [more]) if more else "",
        )


def _to_wire(tenant_id: str, kept: Kept) -> pb.DeletionReceipt:
    said = kept.statement
    try:
        return pb.DeletionReceipt(
            name=names.receipt_name(tenant_id, kept.id),
            issue_time=time_to_wire(_count(said, "issued_at_us")),
            memory_uid=str(said["memory"]),
            documents=str(said["documents"] or ""),
            texts=_count(said, "texts"),
            blocks=_count(said, "blocks"),
            workers_wiped=_count(said, "workers_wiped"),
            workers_owed=_count(said, "workers_owed"),
            receipt=kept.receipt,
            # Receipts from before there were forks do not say.
            shared=str(said.get("shared") or ""),
        )
    except (KeyError, ValueError) as error:
        raise errors.record_corrupt("a deletion receipt") from error


def _count(said: object, name: str) -> int:
    value = said[name] if isinstance(said, dict) else None
    if not isinstance(value, int):
        raise ValueError(name)
    return value
