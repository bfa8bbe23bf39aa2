"""What the client raises.

    MemsvcError
    ├── ConfigurationError            no address or API key was given
    ├── PassphraseError               the passphrase of an archive is wrong or missing
    ├── SealedArchiveError            an archive under a passphrase is cut short or altered
    ├── ImportFormatError             another service's dump is not what its format says
    ├── StreamBrokenError             a stream ended without what it promises
    └── ApiError                      the call failed: code, reason, field, metadata, retry_after_s
        ├── InvalidArgumentError      a field is missing, malformed or too long
        │   └── ArchiveInvalidError   the archive is cut short, altered or forbidden
        ├── UnauthenticatedError      no credential, or one that is not valid
        ├── PermissionDeniedError     the key's scope does not allow the call
        ├── NotFoundError             no such memory, document, model, tenant or key
        ├── AlreadyExistsError        the identifier is taken
        │   └── RequestIdReusedError  the request_id was used with another payload
        ├── EtagMismatchError         the resource changed in between
        ├── FailedPreconditionError   the memory's or archive's state does not allow it
        │   └── OffsetNotAvailableError  an export or import cannot go on there
        ├── ResourceExhaustedError    queue, quota or disk is full
        ├── DeadlineExceededError     the call's time ran out
        ├── UnavailableError          no server, or no worker, can take the call now
        ├── CallCancelledError        the call was cancelled on its way
        ├── DataLossError             a stored record is damaged
        └── InternalError             a fault of the server; `incident` is for its operator

Every failure of the wire becomes one of these at one place, `from_rpc_error`.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_STATUS_KEY = "grpc-status-details-bin"
_DOMAIN = "memsvc"


class MemsvcError(Exception):
    """Root of everything the client raises on its own account."""


class ConfigurationError(MemsvcError):
    """The client was not told enough to connect."""


class PassphraseError(MemsvcError):
    """An archive's passphrase is wrong, empty, or missing."""


class SealedArchiveError(MemsvcError):
    """An archive under a passphrase is cut short, altered, or of a kind unknown here."""


class ImportFormatError(MemsvcError):
    """Another service's dump is not what its format says. The message names the place in it.

    place: such as "conversations[3].mapping", or empty for the whole file.
    """

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place


class StreamBrokenError(MemsvcError):
    """A stream ended without the message that should end it."""


class ApiError(MemsvcError):
    """A call that failed.

    code: gRPC status name, e.g. "NOT_FOUND". reason: name of a
    memsvc.v1.ErrorReason, empty when the failure did not come from the server.
    field: path of the offending request field, or empty. retry_after_s: the
    server's hint; None when the same call cannot be expected to succeed later.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    @property
    def field(self) -> str:
        """Path of the request field to blame, e.g. "turns[3].text"; or empty."""
        return self.metadata.get("field", "")

    @property
    def incident(self) -> str:
        """What to quote to the operator after an InternalError; or empty."""
        return self.metadata.get("incident", "")

    def __str__(self) -> str:
        label = self.reason or self.code
        return f"{label}: {self.message}" if self.message else label


class InvalidArgumentError(ApiError):
    """A field of the request is missing, malformed or too long."""


class ArchiveInvalidError(InvalidArgumentError):
    """An archive is cut short, altered, or breaks a rule."""


class UnauthenticatedError(ApiError):
    """No credential, or one that is unknown, expired or revoked."""


class PermissionDeniedError(ApiError):
    """The key's scope does not allow the call."""


class NotFoundError(ApiError):
    """What the call names does not exist in this tenant."""


class AlreadyExistsError(ApiError):
    """The chosen identifier is taken."""


class RequestIdReusedError(AlreadyExistsError):
    """The request_id was used before with another payload."""


class EtagMismatchError(ApiError):
    """The resource changed since its etag was read."""


class FailedPreconditionError(ApiError):
    """The state of what the call names does not allow it."""


class OffsetNotAvailableError(FailedPreconditionError):
    """A transfer cannot go on where it was asked to."""

    @property
    def available(self) -> int:
        """Bytes behind which it can; 0: from the start alone."""
        return int(self.metadata.get("available", "0"))


class ResourceExhaustedError(ApiError):
    """A queue, a quota or the disk is full."""


class DeadlineExceededError(ApiError):
    """The call's time ran out, or encoding was not ready in time."""


class UnavailableError(ApiError):
    """No server, or no worker behind it, can take the call now."""


class CallCancelledError(ApiError):
    """The call was cancelled on its way."""


class DataLossError(ApiError):
    """A stored record failed its checksum and cannot be rebuilt."""


class InternalError(ApiError):
    """A fault of the server, or an answer that is none of its own."""


_BY_CODE: Mapping[str, type[ApiError]] = {
    "INVALID_ARGUMENT": InvalidArgumentError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "ABORTED": EtagMismatchError,
    "FAILED_PRECONDITION": FailedPreconditionError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": CallCancelledError,
    "DATA_LOSS": DataLossError,
}

_BY_REASON: Mapping[str, type[ApiError]] = {
    "ARCHIVE_TRUNCATED": ArchiveInvalidError,
    "ARCHIVE_CORRUPT": ArchiveInvalidError,
    "ARCHIVE_FORBIDDEN": ArchiveInvalidError,
    "ARCHIVE_SIGNATURE_INVALID": ArchiveInvalidError,
    "OFFSET_NOT_AVAILABLE": OffsetNotAvailableError,
    "REQUEST_ID_REUSED": RequestIdReusedError,
}


def error_class(code: str, reason: str) -> type[ApiError]:
    """The class for a status name and a reason; InternalError for unknown ones."""
    return _BY_REASON.get(reason) or _BY_CODE.get(code, InternalError)


def _status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def from_rpc_error(error: grpc.aio.AioRpcError) -> ApiError:
    """The typed form of a failed call."""
    code = error.code().name
    reason, metadata = "", {}
    retry_after_s: float | None = None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status = _status(error)
    for detail in status.details if status else ():
        if detail.Unpack(info) and info.domain == _DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return error_class(code, reason)(
        error.details() or "",
        code=code,
        reason=reason,
        metadata=metadata,
        retry_after_s=retry_after_s,
    )
