"""The engine seam: all that the worker knows of a model.

An engine encodes documents into KV blocks, routes questions over a memory's
routing keys and generates answers. The worker's scheduler drives it from one
thread: `start` is cheap, `step` advances every running generation by one unit
(a prefill, or one decoded token), so that a new query joins between steps and a
cancelled one leaves. Two engines exist: `model_adapter.msa` and `model_adapter.fake`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.msa.kernels import KeyStorage, ResidentKeys
from storage.layout import KVBlock, KVLayout


class EngineError(Exception):
    """Root of what an engine refuses. `reason` is a memsvc.v1.ErrorReason name."""

    reason = "INTERNAL_FAULT"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.metadata = metadata


class DocumentTooLongError(EngineError):
    """A document has more tokens than the model encodes."""

    reason = "DOCUMENT_TOO_LONG"


class QuestionTooLongError(EngineError):
    """A question has more tokens than the model takes."""

    reason = "QUESTION_TOO_LONG"


class ModelMismatchError(EngineError):
    """Blocks of another model identity were offered."""

    reason = "MODEL_MISMATCH"


@dataclass(frozen=True)
class ModelDescription:
    """What a model is and what it takes. Limits in tokens.

    lexical_weight: share of the question's words in a ranking when nobody says otherwise.
    storing: how its kernels read routing keys on the device; None: it has none. placement: what
    it runs on and why, for people.
    """

    model_id: str
    display_name: str
    identity: str
    layout: KVLayout
    max_document_tokens: int
    max_question_tokens: int
    max_answer_tokens: int
    device: str
    compute_dtype: str
    lexical_weight: float = 0.0
    storing: KeyStorage | None = None
    placement: str = ""


@dataclass(frozen=True)
class DocumentText:
    """A document as the model reads it: its number in the memory, its rendered text."""

    number: int
    text: str


@dataclass(frozen=True)
class EncodeFailure:
    """Why one document of a batch has no block."""

    number: int
    error: EngineError


class MemoryView(Protocol):
    """A memory pinned for reading, as the pager lends it. Chunks are in document order.

    C: chunks of the memory, N: its documents, E: kv heads * head dim. `layer` is
    the index of a routed layer within KVLayout.routed_layers.
    """

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        """Document numbers, ascending."""

    @property
    def chunk_offsets_N1(self) -> npt.NDArray[np.int64]:
        """Document n owns chunks [offsets[n], offsets[n + 1])."""

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first chunk, keys [c, E]) slabs that cover all chunks in order.

        Slabs start and end at document boundaries. A resident memory is one slab;
        one over the routing budget is read slab by slab.
        """

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [c, E] of the documents at these positions in numbers_N, in order."""

    def text(self, number: int) -> str:
        """The rendered source text of a document. Raises KeyError for an unknown number."""


@runtime_checkable
class ResidentView(Protocol):
    """A MemoryView that may have its routing keys on the device, as kernels read them."""

    def resident_keys(self) -> ResidentKeys | None:
        """Of the whole memory; None when they are not all there, or there is no document, and
        `routing_keys` is to be used."""


@dataclass(frozen=True)
class LayerScore:
    """Rank (from 1) and score of a document in one routed layer (its model layer index)."""

    layer: int
    rank: int
    score: float


@dataclass(frozen=True)
class RankedDocument:
    """A document that routing chose; scores compare within one routing only.

    score: what it is ranked by. routing_score: of the routed layers together.
    lexical_score: BM25, 0 where the words found it not or were not asked.
    """

    number: int
    score: float
    layers: tuple[LayerScore, ...]
    routing_score: float = 0.0
    lexical_score: float = 0.0


@dataclass(frozen=True)
class LexicalPrior:
    """What the question's words say: BM25 by document number, and its share in the ranking.

    weight: above 0, up to 1. At least blending.DEPTH documents, where that many share a word.
    """

    weight: float
    scores: Mapping[int, float]


#: Puts a ranking in another order: given how to rank so many documents, and how many are wanted.
Arrange = Callable[[Callable[[int], Sequence[RankedDocument]], int], Sequence[RankedDocument]]


@dataclass(frozen=True)
class Generate:
    """What a query asks for. 0 stands for the model's own value, greedy, or no seed.

    arrange: of the documents that are put in; no matter to a model that names them itself.
    """

    question: str
    max_answer_tokens: int
    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_rounds: int = 0
    prior: LexicalPrior | None = None
    arrange: Arrange | None = None


class FinishReason(Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ROUNDS = "rounds"


@dataclass(frozen=True)
class RoutingEvent:
    """One round's choice, best first. lexical_weight: share that the words had in it."""

    round: int
    documents: tuple[RankedDocument, ...]
    lexical_weight: float = 0.0


@dataclass(frozen=True)
class CitationEvent:
    """A document whose original text was put before the model."""

    number: int
    round: int


@dataclass(frozen=True)
class TextEvent:
    """Whole characters of the answer."""

    text: str


@dataclass
class Counts:
    """What a generation used so far. Times in seconds.

    routed_documents, routed_chunks: size of the memory that routing looked at.
    """

    question_tokens: int = 0
    answer_tokens: int = 0
    document_tokens: int = 0
    routed_documents: int = 0
    routed_chunks: int = 0
    rounds: int = 0
    routing_s: float = 0.0


@dataclass(frozen=True)
class FinishEvent:
    """The last event of a generation."""

    reason: FinishReason


Event = RoutingEvent | CitationEvent | TextEvent | FinishEvent


class Generation(Protocol):
    """One running query; opaque to the scheduler but for this."""

    counts: Counts

    @property
    def done(self) -> bool:
        """True after its FinishEvent was produced."""


@dataclass(frozen=True)
class StepResult:
    """Events of one generation from one step; `error` ends that generation alone."""

    generation: Generation
    events: tuple[Event, ...] = ()
    error: EngineError | None = None


@dataclass(frozen=True)
class Encoded:
    """Result of one encode call; every document is in exactly one list."""

    blocks: list[KVBlock] = field(default_factory=list)
    failures: list[EncodeFailure] = field(default_factory=list)


class Engine(Protocol):
    """One loaded model. The worker calls it from one thread, but for `settle`."""

    @property
    def description(self) -> ModelDescription:
        """Constant for the engine's life."""

    def encode(self, documents: Sequence[DocumentText]) -> Encoded:
        """Each document alone (paper section 3.2), batched by length."""

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        """The best documents over all routed layers, blended with the prior if there is one.

        Empty for an empty memory. Raises QuestionTooLongError.
        """

    def start(self, request: Generate, memory: MemoryView) -> Generation:
        """Validates and queues; computes nothing. Raises QuestionTooLongError."""

    def step(self, generations: Sequence[Generation]) -> list[StepResult]:
        """Advances each by one unit; results in the order given.

        A generation's tokens do not depend on which others share the step.
        """

    def settle(self) -> None:
        """Overwrites what generations that are gone have left. From any thread."""
