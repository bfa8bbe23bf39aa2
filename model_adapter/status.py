"""Typed errors as gRPC statuses: google.rpc.Status with ErrorInfo, domain "model_adapter"."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from model_adapter.engine import EngineError
from model_adapter.errors import DeadlineError, internal_fault

DOMAIN = "model_adapter"

#: When a call that may succeed later is worth repeating.
RETRY_AFTER_MS = 500

_CODES = {
    "DOCUMENT_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
    "QUESTION_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
    "FIELD_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    "TOO_MANY_ITEMS": grpc.StatusCode.INVALID_ARGUMENT,
    "MODEL_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "OVERLOADED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "WORKER_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "RECORD_CORRUPT": grpc.StatusCode.DATA_LOSS,
    "INTERNAL_FAULT": grpc.StatusCode.INTERNAL,
}

_RETRIED = ("OVERLOADED", "DRAINING", "WORKER_UNAVAILABLE")


def status_of(error: EngineError) -> status_pb2.Status:
    """What a caller is told."""
    code = _CODES.get(error.reason, grpc.StatusCode.INTERNAL)
    if isinstance(error, DeadlineError):
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    details = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.reason in _RETRIED:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(RETRY_AFTER_MS)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=str(error))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


@asynccontextmanager
async def translated(context: aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the status of what is raised inside."""
    try:
        yield
    except EngineError as error:
        await context.abort_with_status(rpc_status.to_status(status_of(error)))
    except Exception as error:  # noqa: BLE001  # the boundary: logged by internal_fault
        await context.abort_with_status(rpc_status.to_status(status_of(internal_fault(error))))
