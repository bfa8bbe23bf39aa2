"""A watched engine and plain sinks, for tests of the scheduler."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model_adapter.engine import (
    Arrange,
    DocumentText,
    Encoded,
    EngineError,
    Event,
    FinishEvent,
    Generate,
    Generation,
    LexicalPrior,
    MemoryView,
    ModelDescription,
    RankedDocument,
    StepResult,
    TextEvent,
)
from model_adapter.fake import FakeEngine, FakeSpec
from model_adapter.jobs import EncodeJob, QueryJob, RouteJob, text_bytes
from model_adapter.msa.memory import InMemoryView
from model_adapter.residency import MemoryKey
from model_adapter.scheduler import Scheduler
from tests.support.pages import key

TEXTS = {
    1: "Anna bought a red sailing boat in Kiel last spring",
    2: "Bob plays chess with Carla every Friday evening in the library",
    3: "The garden needs water when summer turns dry",
}
BOAT, CHESS, GARDEN = "Which boat was it?", "Who plays chess?", "What about the garden?"
MEMORY = key(1)

Make = Callable[..., Scheduler]

PATIENCE_S = 10.0


def make_view(engine: FakeEngine) -> InMemoryView:
    encoded = engine.encode([DocumentText(number, text) for number, text in TEXTS.items()])
    return InMemoryView(engine.description.layout, encoded.blocks, TEXTS)


def eventually(condition: Callable[[], object], what: str) -> None:
    """Waits for it; raises AssertionError when it doesn't come."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


@dataclass
class WatchedEngine:
    """The fake engine, with a log of its calls. `hold` lets it go on call by call.

    calls: ("step", generations), ("encode", documents), ("route", 1). fail: raised by
    the next call. `clock` says how long calls took, were they to take seconds_per_byte
    of encoded text and step_s a step. blocked: the call that waits. settled: how often it was
    asked to leave nothing.
    """

    inner: FakeEngine = field(default_factory=lambda: FakeEngine(FakeSpec()))
    calls: list[tuple[str, int]] = field(default_factory=list)
    fail: Exception | None = None
    step_s: float = 1 / 8
    seconds_per_byte: float = 1 / 1024
    now_s: float = 0.0
    blocked: str = ""
    settled: int = 0
    _held: threading.Semaphore | None = None

    def clock(self) -> float:
        """For Scheduler."""
        return self.now_s

    @property
    def description(self) -> ModelDescription:
        return self.inner.description

    def hold(self) -> None:
        """From now on every call waits for `go`."""
        self._held = threading.Semaphore(0)

    def go(self, calls: int = 1) -> None:
        """Lets this many calls through and waits until they have begun."""
        assert self._held is not None
        expected = len(self.calls) + calls
        self._held.release(calls)
        eventually(lambda: len(self.calls) >= expected, "the engine was not called")

    def let_go(self) -> None:
        """No more waiting."""
        held, self._held = self._held, None
        assert held is not None
        held.release(1_000_000)

    def _called(self, what: str, size: int) -> None:
        if self._held is not None:
            self.blocked = what
            self._held.acquire()
            self.blocked = ""
        self.calls.append((what, size))
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    def encode(self, documents: Sequence[DocumentText]) -> Encoded:
        self._called("encode", len(documents))
        self.now_s += sum(map(text_bytes, documents)) * self.seconds_per_byte
        return self.inner.encode(documents)

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        self._called("route", 1)
        return self.inner.route(question, memory, limit, prior, arrange)

    def start(self, request: Generate, memory: MemoryView) -> Generation:
        return self.inner.start(request, memory)

    def step(self, generations: Sequence[Generation]) -> list[StepResult]:
        self._called("step", len(generations))
        self.now_s += self.step_s
        return self.inner.step(generations)

    def settle(self) -> None:
        self.settled += 1


@dataclass
class ListSink:
    """Keeps what it is given."""

    items: list[Any] = field(default_factory=list)
    error: EngineError | None = None
    ends: int = 0
    open: bool = True

    def put(self, item: Any) -> None:
        assert not self.ends, "nothing follows the end"
        self.items.append(item)

    def end(self, error: EngineError | None) -> None:
        self.error = error
        self.ends += 1

    def ready(self) -> bool:
        return self.open

    def wait(self) -> ListSink:
        """Until its end, which comes once."""
        eventually(lambda: self.ends > 0, "the job did not end")
        assert self.ends == 1
        return self

    def text(self) -> str:
        """The answer so far."""
        return "".join(item.text for item in self.items if isinstance(item, TextEvent))


@dataclass
class Asked:
    """A job with its sink, and how often what it held was given back."""

    job: Any
    sink: ListSink
    released: list[bool] = field(default_factory=list)

    def finished(self) -> bool:
        """Whether the generation came to its own end."""
        return any(isinstance(item, FinishEvent) for item in self.sink.items)


def ask(
    scheduler: Scheduler,
    memory: MemoryKey,
    view: MemoryView,
    question: str,
    *,
    max_answer_tokens: int = 0,
    deadline: float | None = None,
) -> Asked:
    """Admits and queues a query."""
    sink = ListSink()
    request = Generate(question, max_answer_tokens)
    asked = Asked(QueryJob(memory, sink, deadline, request=request), sink)
    scheduler.admit(asked.job)
    scheduler.queue(asked.job, view, lambda: asked.released.append(True))
    return asked


def rank(scheduler: Scheduler, memory: MemoryKey, view: MemoryView, question: str) -> Asked:
    """Admits and queues a ranking."""
    sink = ListSink()
    asked = Asked(RouteJob(memory, sink, question=question, limit=5), sink)
    scheduler.admit(asked.job)
    scheduler.queue(asked.job, view, lambda: asked.released.append(True))
    return asked


def encode(
    scheduler: Scheduler, memory: MemoryKey, texts: Sequence[str], deadline: float | None = None
) -> Asked:
    """Queues texts for encoding, numbered from 1."""
    sink = ListSink()
    documents = deque(DocumentText(number, text) for number, text in enumerate(texts, 1))
    asked = Asked(EncodeJob(memory, sink, deadline, documents=documents), sink)
    scheduler.encode(asked.job)
    return asked


def events_alone(engine: FakeEngine, request: Generate, view: MemoryView) -> list[Event]:
    """What a generation yields when nothing shares its steps."""
    generation = engine.start(request, view)
    events: list[Event] = []
    while not generation.done:
        (result,) = engine.step([generation])
        assert result.error is None
        events.extend(result.events)
    return events
