"""ListModels."""

from __future__ import annotations

from memsvc import validation
from memsvc.api.memories import cursor
from memsvc.application import Application
from memsvc.convert import model_to_wire
from memsvc.principal import current_principal
from memsvc.v1 import memory_service_pb2 as pb


class ModelsHandler:
    """The models that workers serve, or have served."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Models are shared by all tenants."""
        binding = (current_principal().tenant_uid, "ListModels")
        limit = validation.check_page_size(request.page_size)
        position = self._app.page_tokens.open(binding, request.page_token)
        rows, after = await self._app.catalog.list_models(limit, cursor(position))
        return pb.ListModelsResponse(
            models=[
                model_to_wire(row, serving=self._app.workers.find(row.model_id) is not None)
                for row in rows
            ],
            next_page_token=self._app.page_tokens.issue(binding, after) if after else "",
        )
