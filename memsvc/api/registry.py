"""WorkerRegistryService and ListWorkers: workers that come by themselves, and all there are."""

from __future__ import annotations

from memsvc import errors, names, validation
from memsvc.api.administering import require_operator
from memsvc.application import Application
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.workers import Endpoint
from memsvc.workers.registered import HEARTBEAT_S, MAX_ADDRESS
from model_adapter.v1 import registry_pb2 as pb


class RegistryHandler:
    """Operator only: a worker reads every tenant's memories."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Also the heartbeat, and the last word of a worker that goes down."""
        require_operator()
        address = validation.check_string("address", request.address, MAX_ADDRESS)
        _check_address(address)
        if request.leaving:
            self._app.workers.leave(address)
        else:
            await self._app.workers.register(address)
        return pb.RegisterResponse(heartbeat_s=HEARTBEAT_S)

    async def list_workers(self, request: admin.ListWorkersRequest) -> admin.ListWorkersResponse:
        """As they answered last."""
        require_operator()
        return admin.ListWorkersResponse(
            workers=[_worker(endpoint) for endpoint in self._app.workers.endpoints]
        )


def _check_address(address: str) -> None:
    if not address:
        raise errors.field_required("address")
    scheme, separator, rest = address.partition(":")
    sound = rest.startswith("/") if scheme == "unix" else rest.rpartition(":")[2].isdecimal()
    if not (separator and rest and sound) or any(c.isspace() or c == "," for c in address):
        raise errors.field_invalid("address", "is neither unix:PATH nor host:port")


def _worker(endpoint: Endpoint) -> admin.Worker:
    info = endpoint.info
    state = admin.Worker.UNREACHABLE
    if endpoint.attached:
        leaving = endpoint.retired or (info is not None and info.draining)
        state = admin.Worker.LEAVING if leaving else admin.Worker.SERVING
    worker = admin.Worker(address=endpoint.address, state=state)
    if info is not None:
        worker.model = names.model_name(info.model_id)
        worker.identity = info.identity
        worker.device = info.device
        worker.compute_dtype = info.compute_dtype
        worker.resident_memories = info.residency.resident_memories
        worker.running_queries = info.residency.running_queries
        worker.waiting_queries = info.residency.waiting_queries
    return worker
