"""Units of work that the scheduler runs. No locks here: the scheduler guards its jobs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from model_adapter.engine import (
    Arrange,
    Counts,
    DocumentText,
    EncodeFailure,
    EngineError,
    Event,
    Generate,
    Generation,
    LexicalPrior,
    MemoryView,
    RankedDocument,
)
from model_adapter.errors import DeadlineError
from model_adapter.residency import MemoryKey
from storage.layout import KVBlock

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)


class Sink(Protocol[Item_contra]):
    """Where results go. Called from the engine's thread; must not block."""

    def put(self, item: Item_contra) -> None:
        """One result, in order."""

    def end(self, error: EngineError | None) -> None:
        """Nothing follows. Called exactly once, when the engine is done with the job."""

    def ready(self) -> bool:
        """Whether it can take more soon; an encode job waits while it can't."""


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Job(Generic[Item]):
    """What all have. deadline: time.monotonic() seconds, None for none.

    stopping: why it is to end at its next turn. release: gives back what the job holds,
    called once when it ends.
    """

    memory: MemoryKey
    sink: Sink[Item]
    deadline: float | None = None
    stopping: EngineError | None = None
    ended: bool = False
    release: Callable[[], None] = _nothing

    def end(self, error: EngineError | None) -> None:
        """Releases what is held and tells the sink; only the first call counts."""
        if not self.ended:
            self.ended = True
            self.release()
            self.sink.end(error)

    def unwanted(self) -> bool:
        """Nobody waits for what comes of it any more."""
        return self.ended or self.stopping is not None

    def verdict(self, now: float) -> EngineError | None:
        """Why it must end now, if it must."""
        if self.stopping is None and self.deadline is not None and now >= self.deadline:
            self.stopping = DeadlineError("the deadline passed")
        return self.stopping


@dataclass(eq=False)
class QueryJob(Job[Event]):
    """One generation. Times from time.monotonic(); 0 before they happened."""

    request: Generate = field(kw_only=True)
    view: MemoryView | None = None
    generation: Generation | None = None
    counts: Counts = field(default_factory=Counts)
    queued_at: float = 0.0
    started_at: float = 0.0

    def take(self, prior: LexicalPrior | None, arrange: Arrange | None) -> None:
        """Before it is queued."""
        self.request = replace(self.request, prior=prior, arrange=arrange)

    def end(self, error: EngineError | None) -> None:
        """Lets go of the generation, and with it of what it copied from the memory."""
        self.generation = None
        self.view = None
        super().end(error)


@dataclass(eq=False)
class RouteJob(Job[list[RankedDocument]]):
    """One ranking: a single turn."""

    question: str = field(kw_only=True)
    limit: int = field(kw_only=True)
    prior: LexicalPrior | None = None
    arrange: Arrange | None = None
    view: MemoryView | None = None

    def take(self, prior: LexicalPrior | None, arrange: Arrange | None) -> None:
        """Before it is queued."""
        self.prior, self.arrange = prior, arrange

    def end(self, error: EngineError | None) -> None:
        """Lets go of the view."""
        self.view = None
        super().end(error)


@dataclass(eq=False)
class EncodeJob(Job[KVBlock | EncodeFailure]):
    """Documents of one memory; taken in batches, never mixed with another memory's.

    The shortest go first: a batch of like lengths wastes no work on padding, so that small
    batches encode as fast as large ones. Results come in that order.
    """

    documents: deque[DocumentText] = field(kw_only=True)
    waiting_since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.documents = deque(sorted(self.documents, key=text_bytes))

    def take(self, max_bytes: int) -> Sequence[DocumentText]:
        """Removes the next documents, at least one, about max_bytes of text together."""
        taken = [self.documents.popleft()]
        size = text_bytes(taken[0])
        while self.documents and (size := size + text_bytes(self.documents[0])) <= max_bytes:
            taken.append(self.documents.popleft())
        return taken


def text_bytes(document: DocumentText) -> int:
    """UTF-8 bytes, the scheduler's measure of work: it has no tokenizer."""
    return len(document.text.encode())
