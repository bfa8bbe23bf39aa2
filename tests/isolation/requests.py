"""One sound request for every RPC, as somebody would send it about what is theirs.

A new RPC without an entry here fails the test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from model_adapter.v1 import registry_pb2
from tests.support.served import turns


@dataclass(frozen=True)
class Own:
    """What a request may name: a memory with document 1, a tenant, a key, an archive, and a
    receipt of a deletion."""

    memory: str
    tenant: str
    key: str
    archive: bytes
    receipt: str


def _put(own: Own) -> list[Message]:
    kind = pb.PutDocumentsRequest
    return [
        kind(header=kind.Header(memory=own.memory)),
        kind(document_start=kind.DocumentStart(title="a title")),
        kind(text="a text"),
        kind(end=kind.End(documents=1)),
    ]


def _import(own: Own) -> list[Message]:
    kind = pb.ImportMemoryRequest
    return [kind(header=kind.Header(display_name="imported")), kind(data=own.archive)]


BASES: Mapping[str, Callable[[Own], list[Message]]] = {
    "CreateMemory": lambda _: [pb.CreateMemoryRequest(memory=resources.Memory(display_name="n"))],
    "GetMemory": lambda own: [pb.GetMemoryRequest(name=own.memory)],
    "ListMemories": lambda _: [pb.ListMemoriesRequest(page_size=1)],
    "UpdateMemory": lambda own: [
        pb.UpdateMemoryRequest(memory=resources.Memory(name=own.memory, display_name="renamed"))
    ],
    "DeleteMemory": lambda own: [pb.DeleteMemoryRequest(name=own.memory)],
    "AppendTurns": lambda own: [pb.AppendTurnsRequest(memory=own.memory, turns=turns("appended"))],
    "PutDocuments": _put,
    "ListDocuments": lambda own: [pb.ListDocumentsRequest(parent=own.memory, page_size=1)],
    "ListRevisions": lambda own: [pb.ListRevisionsRequest(parent=own.memory, page_size=1)],
    "GetDocument": lambda own: [pb.GetDocumentRequest(name=f"{own.memory}/documents/1")],
    "DeleteDocuments": lambda own: [
        pb.DeleteDocumentsRequest(parent=own.memory, names=[f"{own.memory}/documents/1"])
    ],
    "Query": lambda own: [pb.QueryRequest(memory=own.memory, question="what?")],
    "Retrieve": lambda own: [pb.RetrieveRequest(memory=own.memory, question="what?")],
    "WatchMemory": lambda own: [pb.WatchMemoryRequest(name=own.memory)],
    "ExportMemory": lambda own: [pb.ExportMemoryRequest(name=own.memory)],
    "ImportMemory": _import,
    "ForkMemory": lambda own: [pb.ForkMemoryRequest(name=own.memory, display_name="forked")],
    "RestoreMemory": lambda own: [pb.RestoreMemoryRequest(name=own.memory, revision=1)],
    "AttachModel": lambda own: [pb.AttachModelRequest(memory=own.memory, model="models/any")],
    "DetachModel": lambda own: [pb.DetachModelRequest(memory=own.memory, model="models/any")],
    "ListModels": lambda _: [pb.ListModelsRequest(page_size=1)],
    "CreateTenant": lambda _: [admin.CreateTenantRequest(tenant_id="one-more")],
    "GetTenant": lambda own: [admin.GetTenantRequest(name=own.tenant)],
    "UpdateTenant": lambda own: [
        admin.UpdateTenantRequest(tenant=admin.Tenant(name=own.tenant, display_name="renamed"))
    ],
    "ListTenants": lambda _: [admin.ListTenantsRequest(page_size=1)],
    "DeleteTenant": lambda own: [admin.DeleteTenantRequest(name=own.tenant)],
    "CreateApiKey": lambda own: [
        admin.CreateApiKeyRequest(parent=own.tenant, api_key=admin.ApiKey(scope=admin.READ))
    ],
    "ListApiKeys": lambda own: [admin.ListApiKeysRequest(parent=own.tenant, page_size=1)],
    "RevokeApiKey": lambda own: [admin.RevokeApiKeyRequest(name=own.key)],
    "RotateApiKey": lambda own: [admin.RotateApiKeyRequest(name=own.key)],
    "ListWorkers": lambda _: [admin.ListWorkersRequest()],
    "Register": lambda _: [registry_pb2.RegisterRequest(address="unix:/nowhere")],
    "ListAuditEvents": lambda own: [admin.ListAuditEventsRequest(parent=own.tenant, page_size=1)],
    "GetDeletionReceipt": lambda own: [admin.GetDeletionReceiptRequest(name=own.receipt)],
    "ListDeletionReceipts": lambda own: [
        admin.ListDeletionReceiptsRequest(parent=own.tenant, page_size=1)
    ],
    "GetUsage": lambda own: [admin.GetUsageRequest(name=own.tenant)],
    "GetTenantQuotas": lambda own: [admin.GetTenantQuotasRequest(name=f"{own.tenant}/quotas")],
    "UpdateTenantQuotas": lambda own: [
        admin.UpdateTenantQuotasRequest(quotas=admin.TenantQuotas(name=f"{own.tenant}/quotas"))
    ],
}
