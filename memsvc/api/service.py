"""The two servicers: they hand each call to its handler and decide nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from google.protobuf import empty_pb2
from grpc import aio

from memsvc.api.admin import AdminHandler
from memsvc.api.archive import ArchiveHandler
from memsvc.api.audit import AuditHandler
from memsvc.api.documents import DocumentsHandler
from memsvc.api.forks import ForksHandler
from memsvc.api.keys import KeysHandler
from memsvc.api.memories import MemoriesHandler
from memsvc.api.models import ModelsHandler
from memsvc.api.put import PutHandler
from memsvc.api.query import QueryHandler
from memsvc.api.quotas import QuotasHandler
from memsvc.api.receipts import ReceiptsHandler
from memsvc.api.registry import RegistryHandler
from memsvc.api.watch import WatchHandler
from memsvc.application import Application
from memsvc.deletion import issued
from memsvc.receipts import METADATA_KEY
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import admin_service_pb2_grpc, memory_service_pb2_grpc
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from model_adapter.v1 import registry_pb2, registry_pb2_grpc

# Generic for the type checker alone.
Context: TypeAlias = "aio.ServicerContext[Any, Any]"


@contextmanager
def receipts_in(context: Context) -> Iterator[None]:
    """Puts the newest receipt that the call inside issued into its trailing metadata."""
    receipts: list[bytes] = []
    token = issued.set(receipts)
    try:
        yield
    finally:
        issued.reset(token)
    if receipts:
        context.set_trailing_metadata(((METADATA_KEY, receipts[-1]),))


class MemoryService(memory_service_pb2_grpc.MemoryServiceServicer):
    """memsvc.v1.MemoryService."""

    def __init__(self, application: Application) -> None:
        self._memories = MemoriesHandler(application)
        self._documents = DocumentsHandler(application)
        self._put = PutHandler(application)
        self._query = QueryHandler(application)
        self._watch = WatchHandler(application)
        self._archive = ArchiveHandler(application)
        self._forks = ForksHandler(application)
        self._models = ModelsHandler(application)

    async def CreateMemory(
        self, request: pb.CreateMemoryRequest, context: Context
    ) -> resources.Memory:
        """See the proto, here and below."""
        return await self._memories.create_memory(request)

    async def GetMemory(self, request: pb.GetMemoryRequest, context: Context) -> resources.Memory:
        """One memory."""
        return await self._memories.get_memory(request)

    async def ListMemories(
        self, request: pb.ListMemoriesRequest, context: Context
    ) -> pb.ListMemoriesResponse:
        """A page of memories."""
        return await self._memories.list_memories(request)

    async def UpdateMemory(
        self, request: pb.UpdateMemoryRequest, context: Context
    ) -> resources.Memory:
        """Display name and labels."""
        return await self._memories.update_memory(request)

    async def DeleteMemory(
        self, request: pb.DeleteMemoryRequest, context: Context
    ) -> empty_pb2.Empty:
        """All of a memory."""
        with receipts_in(context):
            await self._memories.delete_memory(request)
        return empty_pb2.Empty()

    async def AppendTurns(
        self, request: pb.AppendTurnsRequest, context: Context
    ) -> pb.AppendTurnsResponse:
        """Conversation."""
        return await self._documents.append_turns(request)

    async def PutDocuments(
        self, request_iterator: AsyncIterator[pb.PutDocumentsRequest], context: Context
    ) -> pb.PutDocumentsResponse:
        """Texts."""
        return await self._put.put_documents(request_iterator)

    async def ListDocuments(
        self, request: pb.ListDocumentsRequest, context: Context
    ) -> pb.ListDocumentsResponse:
        """A page of documents."""
        return await self._documents.list_documents(request)

    async def ListRevisions(
        self, request: pb.ListRevisionsRequest, context: Context
    ) -> pb.ListRevisionsResponse:
        """A page of revisions."""
        return await self._documents.list_revisions(request)

    async def GetDocument(
        self, request: pb.GetDocumentRequest, context: Context
    ) -> resources.Document:
        """One document."""
        return await self._documents.get_document(request)

    async def DeleteDocuments(
        self, request: pb.DeleteDocumentsRequest, context: Context
    ) -> pb.DeleteDocumentsResponse:
        """Some documents."""
        with receipts_in(context):
            return await self._documents.delete_documents(request)

    def Query(self, request: pb.QueryRequest, context: Context) -> AsyncIterator[pb.QueryResponse]:
        """An answer."""
        return self._query.query(request, context)

    async def Retrieve(self, request: pb.RetrieveRequest, context: Context) -> pb.RetrieveResponse:
        """Ranked documents."""
        return await self._query.retrieve(request, context)

    def WatchMemory(
        self, request: pb.WatchMemoryRequest, context: Context
    ) -> AsyncIterator[pb.WatchMemoryResponse]:
        """Progress."""
        return self._watch.watch(request)

    def ExportMemory(
        self, request: pb.ExportMemoryRequest, context: Context
    ) -> AsyncIterator[pb.ExportMemoryResponse]:
        """An archive, going out."""
        return self._archive.export(request)

    async def ImportMemory(
        self, request_iterator: AsyncIterator[pb.ImportMemoryRequest], context: Context
    ) -> pb.ImportMemoryResponse:
        """An archive, coming in."""
        return await self._archive.import_memory(request_iterator)

    async def ForkMemory(
        self, request: pb.ForkMemoryRequest, context: Context
    ) -> pb.ForkMemoryResponse:
        """A memory that shares what another one holds."""
        return await self._forks.fork_memory(request)

    async def RestoreMemory(
        self, request: pb.RestoreMemoryRequest, context: Context
    ) -> pb.RestoreMemoryResponse:
        """A memory as it was, by a new revision."""
        with receipts_in(context):
            return await self._forks.restore_memory(request)

    async def AttachModel(
        self, request: pb.AttachModelRequest, context: Context
    ) -> resources.Memory:
        """A further encoding."""
        return await self._models.attach_model(request)

    async def DetachModel(
        self, request: pb.DetachModelRequest, context: Context
    ) -> resources.Memory:
        """An encoding less."""
        return await self._models.detach_model(request)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """A page of models."""
        return await self._models.list_models(request)


class RegistryService(registry_pb2_grpc.WorkerRegistryServiceServicer):
    """model_adapter.v1.WorkerRegistryService."""

    def __init__(self, application: Application) -> None:
        self._registry = RegistryHandler(application)

    async def Register(
        self, request: registry_pb2.RegisterRequest, context: Context
    ) -> registry_pb2.RegisterResponse:
        """A worker is there."""
        return await self._registry.register(request)


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """memsvc.v1.AdminService."""

    def __init__(self, application: Application) -> None:
        self._admin = AdminHandler(application)
        self._registry = RegistryHandler(application)
        self._keys = KeysHandler(application)
        self._quotas = QuotasHandler(application)
        self._audit = AuditHandler(application)
        self._receipts = ReceiptsHandler(application)

    async def CreateTenant(
        self, request: admin.CreateTenantRequest, context: Context
    ) -> admin.Tenant:
        """See the proto, here and below."""
        return await self._admin.create_tenant(request)

    async def GetTenant(self, request: admin.GetTenantRequest, context: Context) -> admin.Tenant:
        """One tenant."""
        return await self._admin.get_tenant(request)

    async def UpdateTenant(
        self, request: admin.UpdateTenantRequest, context: Context
    ) -> admin.Tenant:
        """Display name and default model."""
        return await self._admin.update_tenant(request)

    async def ListTenants(
        self, request: admin.ListTenantsRequest, context: Context
    ) -> admin.ListTenantsResponse:
        """A page of tenants."""
        return await self._admin.list_tenants(request)

    async def DeleteTenant(
        self, request: admin.DeleteTenantRequest, context: Context
    ) -> empty_pb2.Empty:
        """All of a tenant."""
        with receipts_in(context):
            await self._admin.delete_tenant(request)
        return empty_pb2.Empty()

    async def CreateApiKey(
        self, request: admin.CreateApiKeyRequest, context: Context
    ) -> admin.CreateApiKeyResponse:
        """A new key with its secret."""
        return await self._keys.create_api_key(request)

    async def ListApiKeys(
        self, request: admin.ListApiKeysRequest, context: Context
    ) -> admin.ListApiKeysResponse:
        """A page of keys."""
        return await self._keys.list_api_keys(request)

    async def RevokeApiKey(
        self, request: admin.RevokeApiKeyRequest, context: Context
    ) -> admin.ApiKey:
        """Ends a key."""
        return await self._keys.revoke_api_key(request)

    async def RotateApiKey(
        self, request: admin.RotateApiKeyRequest, context: Context
    ) -> admin.RotateApiKeyResponse:
        """A new key in the place of an old one."""
        return await self._keys.rotate_api_key(request)

    async def ListWorkers(
        self, request: admin.ListWorkersRequest, context: Context
    ) -> admin.ListWorkersResponse:
        """All workers."""
        return await self._registry.list_workers(request)

    async def GetUsage(self, request: admin.GetUsageRequest, context: Context) -> admin.TenantUsage:
        """What a tenant holds and has used."""
        return await self._admin.get_usage(request)

    async def GetTenantQuotas(
        self, request: admin.GetTenantQuotasRequest, context: Context
    ) -> admin.TenantQuotas:
        """What a tenant may use."""
        return await self._quotas.get(request)

    async def UpdateTenantQuotas(
        self, request: admin.UpdateTenantQuotasRequest, context: Context
    ) -> admin.TenantQuotas:
        """Changes it."""
        return await self._quotas.update(request)

    async def ListAuditEvents(
        self, request: admin.ListAuditEventsRequest, context: Context
    ) -> admin.ListAuditEventsResponse:
        """A page of the audit trail."""
        return await self._audit.list_audit_events(request)

    async def GetDeletionReceipt(
        self, request: admin.GetDeletionReceiptRequest, context: Context
    ) -> admin.DeletionReceipt:
        """One proof of a deletion."""
        return await self._receipts.get(request)

    async def ListDeletionReceipts(
        self, request: admin.ListDeletionReceiptsRequest, context: Context
    ) -> admin.ListDeletionReceiptsResponse:
        """A page of them."""
        return await self._receipts.list(request)
