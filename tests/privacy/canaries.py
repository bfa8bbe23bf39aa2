"""Requests with a canary in every field that can carry one, made from the descriptors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

#: Begins every canary. Lower case, so that it also makes a sound identifier.
MARK = "qzxcanary"
_DEADLINE_S = 20.0
_REPLIES = 20
_DEPTH = 8

_numbers = count(1)


def canary() -> str:
    """A canary that no other place has."""
    return f"{MARK}-{next(_numbers):06}"


class Planter:
    """Fills messages. known: what a field must hold for the call to get anywhere, by name.

    spoil: applied to every canary, to make it hostile.
    """

    def __init__(self, known: Mapping[str, Any], prefix: str = "", suffix: str = "") -> None:
        self._known = known
        self._prefix, self._suffix = prefix, suffix

    def messages(self, descriptor: Descriptor) -> list[Message]:
        """One message for each choice that its largest oneof leaves."""
        choices = max((len(oneof.fields) for oneof in descriptor.oneofs), default=1)
        return [self._message(descriptor, choice, 0) for choice in range(choices)]

    def _message(self, descriptor: Descriptor, choice: int, depth: int) -> Message:
        message = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            oneof = field.containing_oneof
            chosen = oneof is None or oneof.fields[choice % len(oneof.fields)] is field
            if chosen and depth < _DEPTH:
                self._fill(message, field, choice, depth)
        return message

    def _fill(self, message: Message, field: FieldDescriptor, choice: int, depth: int) -> None:
        name = f"{message.DESCRIPTOR.name}.{field.name}"
        known = self._known.get(name, self._known.get(field.name))
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[f"{MARK}.key"] = self._text()
        elif field.message_type is not None:
            inner = self._message(field.message_type, choice, depth + 1)
            inner = known if isinstance(known, Message) else inner
            if field.is_repeated:
                getattr(message, field.name).append(inner)
            else:
                getattr(message, field.name).CopyFrom(inner)
        else:
            value = self._value(field) if known is None else known
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)

    def _value(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                if field.type == FieldDescriptor.TYPE_BYTES:
                    return self._text().encode()
                return self._text()
            case FieldDescriptor.CPPTYPE_BOOL:
                return False
            case FieldDescriptor.CPPTYPE_ENUM:
                return 1
            case _:
                return 0

    def _text(self) -> str:
        return f"{self._prefix}{canary()}{self._suffix}"


class Sender:
    """Sends raw requests and keeps what comes back of failures."""

    def __init__(self, address: str, api_key: str) -> None:
        self._channel: Any = grpc.insecure_channel(address)
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        #: Status names by method.
        self.outcomes: dict[str, set[str]] = {}
        #: Everything a failed call showed: details and trailing metadata.
        self.failures: list[bytes] = []

    def close(self) -> None:
        self._channel.close()

    def send(self, method: MethodDescriptor, requests: Sequence[bytes]) -> str:
        """Returns the status' name."""
        try:
            for _ in self._replies(method, requests):
                pass
        except grpc.RpcError as error:
            failed: Any = error
            status = str(failed.code().name)
            self.failures.append((failed.details() or "").encode())
            for key, value in failed.trailing_metadata() or ():
                self.failures.append(
                    value if isinstance(value, bytes) else f"{key}{value}".encode()
                )
        else:
            status = "OK"
        self.outcomes.setdefault(method.name, set()).add(status)
        return status

    def _replies(self, method: MethodDescriptor, requests: Sequence[bytes]) -> Iterator[bytes]:
        path = f"/{method.containing_service.full_name}/{method.name}"
        options: Any = {"timeout": _DEADLINE_S, "metadata": self._metadata}
        if method.client_streaming:
            yield self._channel.stream_unary(path)(iter(requests), **options)
        elif method.server_streaming:
            stream = self._channel.unary_stream(path)(requests[0], **options)
            for number, reply in enumerate(stream, start=1):
                yield reply
                if method.name == "WatchMemory" or number == _REPLIES:
                    stream.cancel()
                    return
        else:
            yield self._channel.unary_unary(path)(requests[0], **options)
