"""Requests as bytes, and what is wrong with those that do not parse.

gRPC would answer a request that protobuf refuses with UNKNOWN and the parser's
words. The gate therefore takes raw bytes and parses them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from google.protobuf import empty_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.v1 import admin_service_pb2, memory_service_pb2
from memsvc.validation import MAX_REQUEST_BYTES
from model_adapter.v1 import registry_pb2

_SERVICES = (
    memory_service_pb2.DESCRIPTOR.services_by_name["MemoryService"],
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
    registry_pb2.DESCRIPTOR.services_by_name["WorkerRegistryService"],
)

#: Every call of the public API by its path, e.g. "/memsvc.v1.MemoryService/GetMemory".
METHODS: Mapping[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for service in _SERVICES
    for method in service.methods
}

_LENGTH_DELIMITED = 2
_MAX_DEPTH = 16


def parse_request(method: str, data: bytes) -> Message:
    """Raises TEXT_TOO_LONG, TEXT_NOT_CLEAN naming the field, or FIELD_INVALID."""
    if len(data) > MAX_REQUEST_BYTES:
        raise errors.text_too_long("request", limit=MAX_REQUEST_BYTES, actual=len(data))
    try:
        return _message_class(method).FromString(data)
    except DecodeError as error:
        raise explain(METHODS[method].input_type, data) from error


def explain(descriptor: Descriptor, data: bytes) -> ApiError:
    """Why bytes do not parse as a message: the first string that is not UTF-8, if any."""
    path = _bad_string(descriptor, data, 0)
    if path is not None:
        return errors.text_not_clean(path, "is not valid UTF-8")
    return errors.field_invalid("request", "is not a well-formed protobuf message")


@cache
def _message_class(method: str) -> type[Message]:
    return GetMessageClass(METHODS[method].input_type)


def _bad_string(descriptor: Descriptor, data: bytes, depth: int) -> str | None:
    """Path of the first string field that is not UTF-8."""
    try:
        fields = UnknownFieldSet(empty_pb2.Empty.FromString(data))
    except DecodeError:
        return None
    seen: dict[int, int] = {}
    for position in range(len(fields)):
        unknown = fields[position]
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or unknown.wire_type != _LENGTH_DELIMITED:
            continue
        index = seen.get(field.number, 0)
        seen[field.number] = index + 1
        problem = _problem_in(field, unknown.data, depth)
        if problem is not None:
            return _join(field, index, problem)
    return None


def _problem_in(field: FieldDescriptor, data: bytes, depth: int) -> str | None:
    """None when sound, else the path below the field: "" for the field itself."""
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            return ""
    elif field.message_type is not None and depth < _MAX_DEPTH:
        return _bad_string(field.message_type, data, depth + 1)
    return None


def _join(field: FieldDescriptor, index: int, below: str) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return field.name
    name = f"{field.name}[{index}]" if field.is_repeated else field.name
    return f"{name}.{below}" if below else name
