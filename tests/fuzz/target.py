"""Calls of a live server with bytes of any kind, and what an answer may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from memsvc.v1 import admin_service_pb2, errors_pb2, memory_service_pb2

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in (memory_service_pb2, admin_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

_REASONS = set(errors_pb2.ErrorReason.keys())
_DEADLINE_S = 20.0
#: A stream is read this far and then cancelled; a watch has no end of its own.
_MAX_REPLIES = 20


class UnsoundAnswerError(AssertionError):
    """An answer that the API does not allow."""


@dataclass(frozen=True)
class Outcome:
    """status: gRPC name. reason: of its ErrorInfo, empty for OK."""

    status: str
    reason: str


class Target:
    """One server under fuzzing."""

    def __init__(self, address: str, api_key: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    def close(self) -> None:
        self._channel.close()

    def call(
        self,
        method: MethodDescriptor,
        requests: list[bytes],
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> Outcome:
        """Sends the bytes as they are. Raises UnsoundAnswerError."""
        try:
            for _ in self._replies(method, requests, metadata or self._metadata):
                pass
        except grpc.RpcError as error:
            return judge(method.name, error)
        return Outcome("OK", "")

    def _replies(
        self,
        method: MethodDescriptor,
        requests: list[bytes],
        metadata: tuple[tuple[str, str], ...],
    ) -> Iterator[bytes]:
        path = f"/{method.containing_service.full_name}/{method.name}"
        options: Any = {"timeout": _DEADLINE_S, "metadata": metadata}
        channel: Any = self._channel  # Without serializers it takes and gives bytes.
        if method.client_streaming:
            yield channel.stream_unary(path)(iter(requests), **options)
        elif method.server_streaming:
            stream = channel.unary_stream(path)(requests[0], **options)
            for count, reply in enumerate(stream, start=1):
                yield reply
                if method.name == "WatchMemory" or count == _MAX_REPLIES:
                    stream.cancel()
                    return
        else:
            yield channel.unary_unary(path)(requests[0], **options)


def judge(method: str, error: grpc.RpcError) -> Outcome:
    """A failure's status and reason. Raises UnsoundAnswerError for one that should not be."""
    code: grpc.StatusCode = error.code()
    status = rpc_status.from_call(error)
    if status is None:
        raise UnsoundAnswerError(f"{method}: {code.name} without details: {error.details()}")
    info = error_details_pb2.ErrorInfo()
    reasons = [info.reason for detail in status.details if detail.Unpack(info)]
    if len(reasons) != 1 or info.domain != "memsvc":
        raise UnsoundAnswerError(f"{method}: {code.name} with ErrorInfo reasons {reasons}")
    reason = reasons[0]
    if reason not in _REASONS or reason == "ERROR_REASON_UNSPECIFIED":
        raise UnsoundAnswerError(f"{method}: unknown reason {reason!r}")
    if reason == "INTERNAL_FAULT" or code in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}:
        raise UnsoundAnswerError(f"{method}: {code.name} {reason}: {error.details()}")
    return Outcome(code.name, reason)
