"""What a request can name, found by walking the descriptors of every RPC.

Each string and bytes field of every request message, however deep, has a kind here: a
field without one fails the test, so that whoever adds a field says what it may name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

_MAX_DEPTH = 4


class Kind(StrEnum):
    """What the value of a field names. The last two name nothing of a tenant's."""

    MEMORY = "memory"
    DOCUMENT = "document"
    TENANT = "tenant"
    API_KEY = "api key"
    QUOTAS = "quotas"
    RECEIPT = "receipt"
    PAGE_TOKEN = "page token"
    REQUEST_ID = "request id"
    ETAG = "etag"
    UID = "uid"
    MEMORY_ID = "memory id"
    TENANT_ID = "tenant id"
    ARCHIVE = "archive"
    MODEL = "model"
    PLAIN = "plain"


NAMELESS = (Kind.MODEL, Kind.PLAIN)

#: By field name alone, where that says it.
_BY_NAME = {
    "page_token": Kind.PAGE_TOKEN,
    "request_id": Kind.REQUEST_ID,
    "etag": Kind.ETAG,
    "uid": Kind.UID,
    "forked_from_uid": Kind.UID,
    "memory_id": Kind.MEMORY_ID,
    "tenant_id": Kind.TENANT_ID,
    "model": Kind.MODEL,
    "default_model": Kind.MODEL,
    "next_model": Kind.MODEL,
    "display_name": Kind.PLAIN,
    "question": Kind.PLAIN,
    "text": Kind.PLAIN,
    "title": Kind.PLAIN,
    "speaker": Kind.PLAIN,
    "speakers": Kind.PLAIN,
    "session": Kind.PLAIN,
    "failure": Kind.PLAIN,
    "address": Kind.PLAIN,
    "signed_by": Kind.PLAIN,
}

#: By message and field.
_BY_FIELD = {
    "Memory.name": Kind.MEMORY,
    "GetMemoryRequest.name": Kind.MEMORY,
    "DeleteMemoryRequest.name": Kind.MEMORY,
    "AppendTurnsRequest.memory": Kind.MEMORY,
    "Header.memory": Kind.MEMORY,
    "ListDocumentsRequest.parent": Kind.MEMORY,
    "ListRevisionsRequest.parent": Kind.MEMORY,
    "GetDocumentRequest.name": Kind.DOCUMENT,
    "DeleteDocumentsRequest.parent": Kind.MEMORY,
    "DeleteDocumentsRequest.names": Kind.DOCUMENT,
    "QueryRequest.memory": Kind.MEMORY,
    "RetrieveRequest.memory": Kind.MEMORY,
    "WatchMemoryRequest.name": Kind.MEMORY,
    "AttachModelRequest.memory": Kind.MEMORY,
    "DetachModelRequest.memory": Kind.MEMORY,
    "ExportMemoryRequest.name": Kind.MEMORY,
    "ForkMemoryRequest.name": Kind.MEMORY,
    "RestoreMemoryRequest.name": Kind.MEMORY,
    "ImportMemoryRequest.data": Kind.ARCHIVE,
    "FieldMask.paths": Kind.PLAIN,
    "Metadata.key": Kind.PLAIN,
    "Metadata.values": Kind.PLAIN,
    "Tenant.name": Kind.TENANT,
    "GetTenantRequest.name": Kind.TENANT,
    "DeleteTenantRequest.name": Kind.TENANT,
    "ApiKey.name": Kind.API_KEY,
    "ApiKey.memories": Kind.MEMORY,
    "CreateApiKeyRequest.parent": Kind.TENANT,
    "ListApiKeysRequest.parent": Kind.TENANT,
    "RevokeApiKeyRequest.name": Kind.API_KEY,
    "RotateApiKeyRequest.name": Kind.API_KEY,
    "GetUsageRequest.name": Kind.TENANT,
    "TenantQuotas.name": Kind.QUOTAS,
    "GetTenantQuotasRequest.name": Kind.QUOTAS,
    "ListAuditEventsRequest.parent": Kind.TENANT,
    "GetDeletionReceiptRequest.name": Kind.RECEIPT,
    "ListDeletionReceiptsRequest.parent": Kind.TENANT,
}

_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
_INTEGERS = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, *_UNSIGNED}
_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}


@dataclass(frozen=True)
class Leaf:
    """One scalar field of a request, by its path from the request message."""

    path: tuple[FieldDescriptor, ...]

    @property
    def field(self) -> FieldDescriptor:
        """The scalar itself."""
        return self.path[-1]

    @property
    def name(self) -> str:
        """As errors name it, but without indices."""
        return ".".join(field.name for field in self.path)

    @property
    def is_text(self) -> bool:
        """Whether it could name something."""
        return bool(self.field.cpp_type == FieldDescriptor.CPPTYPE_STRING)

    @property
    def kind(self) -> Kind | None:
        """None for a text that nobody has classified."""
        if not self.is_text:
            return Kind.PLAIN
        owner = self.field.containing_type
        full = f"{owner.name if owner is not None else ''}.{self.field.name}"
        return _BY_FIELD.get(full) or _BY_NAME.get(self.field.name)

    @property
    def is_ignored_on_input(self) -> bool:
        """A field that the server fills in, or the name of what a call makes."""
        behaviour = self.field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        return field_behavior_pb2.OUTPUT_ONLY in behaviour or self._below_output()

    def _below_output(self) -> bool:
        for above in self.path[:-1]:
            behaviour = above.GetOptions().Extensions[field_behavior_pb2.field_behavior]
            if field_behavior_pb2.OUTPUT_ONLY in behaviour:
                return True
        return False

    def set(self, stream: list[Message], value: object) -> bool:
        """Sets it in the message of a stream that has its place. False: there is none."""
        for message in stream:
            top = self.path[0]
            if top.containing_oneof and message.WhichOneof(top.containing_oneof.name) != top.name:
                continue
            _set(message, self.path, value)
            return True
        return False

    def hostile_values(self) -> list[object]:
        """Values that a check might refuse before or after it looks for what is named."""
        if self.field.enum_type is not None:
            return [99]
        if self.field.cpp_type in _INTEGERS:
            return [2**31 - 1 if self.field.cpp_type in _UNSIGNED else -1]
        if self.field.cpp_type in _FLOATS:
            return [float("nan")]
        if self.field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return [True]
        return [b"\x00"] if self.field.type == FieldDescriptor.TYPE_BYTES else ["\x07"]


def _set(message: Message, path: tuple[FieldDescriptor, ...], value: object) -> None:
    field, rest = path[0], path[1:]
    if not rest and field.is_repeated:
        message.ClearField(field.name)
        getattr(message, field.name).extend(value if isinstance(value, list) else [value])
    elif not rest:
        setattr(message, field.name, value)
    elif field.is_repeated:
        items = getattr(message, field.name)
        _set(items[0] if len(items) else items.add(), rest, value)
    else:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _set(inner, rest, value)


def leaves(descriptor: Descriptor) -> Iterator[Leaf]:
    """Every scalar of a message, depth first. Maps hold what the application likes."""
    for path in _paths(descriptor, 0):
        yield Leaf(path)


def _paths(descriptor: Descriptor, depth: int) -> Iterator[tuple[FieldDescriptor, ...]]:
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None:
            yield (field,)
        elif depth < _MAX_DEPTH and not inner.GetOptions().map_entry:
            for below in _paths(inner, depth + 1):
                yield (field, *below)
