"""One failed call as its caller sees it: a reason, its gRPC code, its google.rpc.Status.

    ApiError            one failed call; `reason` is a memsvc.v1.ErrorReason
    └─ retry_after_s    set when, and only when, the same call may succeed later

The constructors, one for each reason, are in `memsvc.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from memsvc.v1.errors_pb2 import ErrorReason

DOMAIN = "memsvc"

#: Trailing metadata that carries google.rpc.Status.
STATUS_DETAILS_KEY = "grpc-status-details-bin"

Code = grpc.StatusCode

#: The gRPC code of every reason; errors.proto says the same in its comments.
CODES: Mapping[ErrorReason.ValueType, grpc.StatusCode] = {
    ErrorReason.FIELD_REQUIRED: Code.INVALID_ARGUMENT,
    ErrorReason.FIELD_INVALID: Code.INVALID_ARGUMENT,
    ErrorReason.TEXT_TOO_LONG: Code.INVALID_ARGUMENT,
    ErrorReason.TEXT_NOT_CLEAN: Code.INVALID_ARGUMENT,
    ErrorReason.TOO_MANY_ITEMS: Code.INVALID_ARGUMENT,
    ErrorReason.PAGE_TOKEN_INVALID: Code.INVALID_ARGUMENT,
    ErrorReason.QUESTION_TOO_LONG: Code.INVALID_ARGUMENT,
    ErrorReason.DOCUMENT_TOO_LONG: Code.INVALID_ARGUMENT,
    ErrorReason.STREAM_PROTOCOL: Code.INVALID_ARGUMENT,
    ErrorReason.ARCHIVE_TRUNCATED: Code.INVALID_ARGUMENT,
    ErrorReason.ARCHIVE_CORRUPT: Code.INVALID_ARGUMENT,
    ErrorReason.ARCHIVE_VERSION_UNSUPPORTED: Code.FAILED_PRECONDITION,
    ErrorReason.ARCHIVE_FORBIDDEN: Code.INVALID_ARGUMENT,
    ErrorReason.OFFSET_NOT_AVAILABLE: Code.FAILED_PRECONDITION,
    ErrorReason.ARCHIVE_SIGNATURE_INVALID: Code.INVALID_ARGUMENT,
    ErrorReason.CREDENTIAL_INVALID: Code.UNAUTHENTICATED,
    ErrorReason.SCOPE_INSUFFICIENT: Code.PERMISSION_DENIED,
    ErrorReason.MEMORY_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.DOCUMENT_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.MODEL_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.TENANT_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.API_KEY_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.RECEIPT_NOT_FOUND: Code.NOT_FOUND,
    ErrorReason.ALREADY_EXISTS: Code.ALREADY_EXISTS,
    ErrorReason.ETAG_MISMATCH: Code.ABORTED,
    ErrorReason.REQUEST_ID_REUSED: Code.ALREADY_EXISTS,
    ErrorReason.MEMORY_NOT_ACTIVE: Code.FAILED_PRECONDITION,
    ErrorReason.REVISION_NOT_REACHED: Code.FAILED_PRECONDITION,
    ErrorReason.API_KEY_NOT_ACTIVE: Code.FAILED_PRECONDITION,
    ErrorReason.MODEL_NOT_ATTACHED: Code.FAILED_PRECONDITION,
    ErrorReason.MODEL_IN_USE: Code.FAILED_PRECONDITION,
    ErrorReason.FILTER_UNSUPPORTED: Code.FAILED_PRECONDITION,
    ErrorReason.ENCODING_BACKLOG_FULL: Code.RESOURCE_EXHAUSTED,
    ErrorReason.STORAGE_FULL: Code.RESOURCE_EXHAUSTED,
    ErrorReason.OVERLOADED: Code.RESOURCE_EXHAUSTED,
    ErrorReason.QUOTA_EXCEEDED: Code.RESOURCE_EXHAUSTED,
    ErrorReason.STREAM_TIMEOUT: Code.DEADLINE_EXCEEDED,
    ErrorReason.CREDENTIAL_ATTEMPTS: Code.RESOURCE_EXHAUSTED,
    ErrorReason.ENCODING_NOT_READY: Code.DEADLINE_EXCEEDED,
    ErrorReason.WORKER_UNAVAILABLE: Code.UNAVAILABLE,
    ErrorReason.DRAINING: Code.UNAVAILABLE,
    ErrorReason.CATALOG_UNAVAILABLE: Code.UNAVAILABLE,
    ErrorReason.STORE_UNAVAILABLE: Code.UNAVAILABLE,
    ErrorReason.SERVED_ELSEWHERE: Code.UNAVAILABLE,
    ErrorReason.DELETION_UNFINISHED: Code.UNAVAILABLE,
    ErrorReason.RECORD_CORRUPT: Code.DATA_LOSS,
    ErrorReason.MODEL_MISMATCH: Code.FAILED_PRECONDITION,
    ErrorReason.INTERNAL_FAULT: Code.INTERNAL,
}


class ApiError(Exception):
    """A call failed for a reason its caller may know.

    message: for people; never holds users' text, questions or secrets.
    field: path of the offending request field ("turns[3].text"), empty for none.
    retry_after_s: seconds after which the same call may succeed; None: never.
    """

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        **metadata: str | int,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = {key: str(value) for key, value in metadata.items()}

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return CODES[self.reason]

    def __repr__(self) -> str:
        name = ErrorReason.Name(self.reason)
        return f"ApiError({name}, {self.message!r}, field={self.field!r}, {self.metadata})"

    def to_status(self) -> status_pb2.Status:
        """google.rpc.Status with ErrorInfo and, when retrying helps, RetryInfo."""
        metadata = dict(self.metadata)
        if self.field:
            metadata["field"] = self.field
        details = [
            error_details_pb2.ErrorInfo(
                reason=ErrorReason.Name(self.reason), domain=DOMAIN, metadata=metadata
            )
        ]
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            status.details.append(_pack(detail))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMicroseconds(max(0, round(self.retry_after_s * 1e6)))
            status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
