"""ListModels, AttachModel, DetachModel."""

from __future__ import annotations

from memsvc import errors, names, validation
from memsvc.api.memories import cursor, find_active_memory, shown
from memsvc.application import Application
from memsvc.attaching import attach_model, detach_model
from memsvc.convert import model_to_wire
from memsvc.principal import current_principal
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2
from storage.catalog import ConflictError, MemoryRow, ModelNotFoundError, NotFoundError


class ModelsHandler:
    """The models that workers serve, or have served, and the memories encoded under them."""

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

    async def attach_model(self, request: pb.AttachModelRequest) -> resources_pb2.Memory:
        """Encoding begins at once, behind what waits under models that answer."""
        model_id = names.parse_model("model", request.model)
        memory = await find_active_memory(self._app, "memory", request.memory)
        try:
            row = await attach_model(self._app, memory, model_id, make_default=request.make_default)
        except ModelNotFoundError as error:
            raise errors.model_not_found() from error
        except NotFoundError as error:
            raise errors.memory_not_found("memory") from error
        return await self._shown(row)

    async def detach_model(self, request: pb.DetachModelRequest) -> resources_pb2.Memory:
        """The catalog first: what a crash leaves of the blocks, reconcile removes."""
        model_id = names.parse_model("model", request.model)
        memory = await find_active_memory(self._app, "memory", request.memory)
        try:
            row = await detach_model(self._app, memory, model_id)
        except ConflictError as error:
            raise errors.model_in_use(model_id) from error
        except NotFoundError as error:
            raise errors.memory_not_found("memory") from error
        return await self._shown(row)

    async def _shown(self, row: MemoryRow) -> resources_pb2.Memory:
        return await shown(self._app, row)
