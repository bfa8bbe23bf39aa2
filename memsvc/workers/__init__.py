"""What memsvc knows of its model-adapter workers."""

from memsvc.workers.client import DocumentText, EncodeFailure, WorkerClient
from memsvc.workers.endpoint import Endpoint
from memsvc.workers.failures import WorkerFaultError, cause_elsewhere
from memsvc.workers.registry import Evicted, ServedModel, Workers

__all__ = [
    "DocumentText",
    "EncodeFailure",
    "Endpoint",
    "Evicted",
    "ServedModel",
    "WorkerClient",
    "WorkerFaultError",
    "Workers",
    "cause_elsewhere",
]
