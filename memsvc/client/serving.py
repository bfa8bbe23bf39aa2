"""Models and the workers that serve them, as the client shows them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import resources_pb2 as wire


class ModelState(StrEnum):
    """Whether a worker serves the model now."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class KVLayout:
    """Shape of the stored KV of one model."""

    routed_layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    pool_tokens: int
    dtype: str
    separate_routing_keys: bool


@dataclass(frozen=True)
class Model:
    """A model some worker serves; limits in tokens."""

    name: str
    display_name: str
    state: ModelState
    identity: str
    layout: KVLayout
    max_document_tokens: int
    max_question_tokens: int
    max_answer_tokens: int
    default_model: bool


class WorkerState(StrEnum):
    """Whether a worker gets work, finishes what it has, or does not answer."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    LEAVING = "leaving"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Worker:
    """A process that holds a model, as it answered last."""

    address: str
    state: WorkerState
    model: str
    identity: str
    device: str
    compute_dtype: str
    resident_memories: int
    running_queries: int
    waiting_queries: int


def model(message: wire.Model) -> Model:
    """A model some worker serves."""
    states = {
        wire.Model.SERVING: ModelState.SERVING,
        wire.Model.UNAVAILABLE: ModelState.UNAVAILABLE,
    }
    layout = message.layout
    return Model(
        name=message.name,
        display_name=message.display_name,
        state=states.get(message.state, ModelState.UNKNOWN),
        identity=message.identity,
        layout=KVLayout(
            routed_layers=tuple(layout.routed_layers),
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            pool_tokens=layout.pool_tokens,
            dtype=layout.dtype,
            separate_routing_keys=layout.separate_routing_keys,
        ),
        max_document_tokens=message.limits.max_document_tokens,
        max_question_tokens=message.limits.max_question_tokens,
        max_answer_tokens=message.limits.max_answer_tokens,
        default_model=message.default_model,
    )


def worker(message: admin.Worker) -> Worker:
    """A worker resource."""
    states = {
        admin.Worker.SERVING: WorkerState.SERVING,
        admin.Worker.LEAVING: WorkerState.LEAVING,
        admin.Worker.UNREACHABLE: WorkerState.UNREACHABLE,
    }
    return Worker(
        address=message.address,
        state=states.get(message.state, WorkerState.UNKNOWN),
        model=message.model,
        identity=message.identity,
        device=message.device,
        compute_dtype=message.compute_dtype,
        resident_memories=message.resident_memories,
        running_queries=message.running_queries,
        waiting_queries=message.waiting_queries,
    )
