"""What a worker's failure means to a caller of memsvc."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from memsvc import errors
from memsvc.api_error import STATUS_DETAILS_KEY, ApiError
from memsvc.v1.errors_pb2 import ErrorReason

WORKER_DOMAIN = "model_adapter"

#: Hint for a caller whose worker is gone: a supervised one is back about then.
RETRY_AFTER_S = 2.0

#: Metadata of the worker's errors that callers may see; the rest stays inside.
_PUBLIC_METADATA = ("limit", "actual", "number", "record", "incident", "retry_after_s")

#: Codes a call ends with when the peer process went away under it.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)


class WorkerFaultError(Exception):
    """The worker broke its contract or failed inside; not the caller's doing."""


#: What a call to a worker fails with. UsageError: its channel was closed, as the worker is gone.
CALL_FAILURES = (aio.AioRpcError, aio.UsageError)


def from_call_failure(
    error: aio.AioRpcError | aio.UsageError, model: str
) -> ApiError | WorkerFaultError:
    """The error to raise for a failed call to the worker of `model`."""
    if not isinstance(error, aio.AioRpcError):
        return errors.worker_unavailable(model, RETRY_AFTER_S)
    info = _error_info(error)
    if info is not None:
        return _from_info(info, error.details() or "", model)
    code = error.code()
    if code in _LOST:
        return errors.worker_unavailable(model, RETRY_AFTER_S)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(
            ErrorReason.WORKER_UNAVAILABLE,
            "the worker did not answer before the deadline",
            retry_after_s=RETRY_AFTER_S,
            model=model,
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.overloaded()
    return WorkerFaultError(f"the worker failed with {code.name}")


def cause_elsewhere(error: ApiError) -> str:
    """Why a worker's call failed by no doing of its own, in the worker's word; "" for any other."""
    call = error.__cause__
    info = _error_info(call) if isinstance(call, aio.AioRpcError) else None
    return info.metadata.get("cause", "") if info is not None else ""


def _error_info(error: aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    for key, value in error.trailing_metadata() or ():
        if key != STATUS_DETAILS_KEY or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
                return info
    return None


def _from_info(
    info: error_details_pb2.ErrorInfo, message: str, model: str
) -> ApiError | WorkerFaultError:
    metadata = {k: v for k, v in info.metadata.items() if k in _PUBLIC_METADATA}
    match info.reason:
        case "WORKER_UNAVAILABLE" | "DRAINING":
            return errors.worker_unavailable(model, RETRY_AFTER_S)
        case "OVERLOADED":
            return errors.overloaded()
        case "QUESTION_TOO_LONG":
            return ApiError(ErrorReason.QUESTION_TOO_LONG, message, field="question", **metadata)
        case "RECORD_CORRUPT":
            return ApiError(ErrorReason.RECORD_CORRUPT, message, **metadata)
        case "MODEL_MISMATCH":
            return ApiError(ErrorReason.MODEL_MISMATCH, message, **metadata)
        case reason:
            return WorkerFaultError(f"the worker failed with {reason}: {message}")
