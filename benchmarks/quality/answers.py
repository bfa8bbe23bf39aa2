"""Answers of one engine, over a whole memory or over given documents alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from model_adapter.engine import (
    Arrange,
    CitationEvent,
    Engine,
    Generate,
    MemoryView,
    RankedDocument,
    StepResult,
    TextEvent,
)


@dataclass
class Answer:
    """What one question got. cited: numbers of the documents whose text was put in."""

    text: str = ""
    cited: list[int] = field(default_factory=list)
    document_tokens: int = 0


@dataclass(frozen=True)
class Asked:
    """A question, the memory it is asked over, how many documents may be put in (0: as many as
    the model takes), and their numbers in another ranking's order, which replaces routing's."""

    question: str
    memory: MemoryView
    documents: int
    order: Sequence[int] = ()


def answer_all(
    engine: Engine, asked: Iterable[Asked], *, tokens: int, batch: int = 1
) -> Iterator[tuple[Answer, float]]:
    """Greedy answers in order, each with its share of the seconds that its group took.

    tokens: of an answer, at most. batch: questions that run together. The documents that
    another ranking chose are put in by asking over a memory of them alone, in its order, so
    that every ranking has the same answering.
    """
    group: list[Asked] = []
    for item in asked:
        group.append(item)
        if len(group) == batch:
            yield from _together(engine, group, tokens)
            group = []
    if group:
        yield from _together(engine, group, tokens)


def _together(
    engine: Engine, group: Sequence[Asked], tokens: int
) -> Iterator[tuple[Answer, float]]:
    started = time.perf_counter()
    everyone = [(engine.start(_request(asked, tokens), asked.memory), Answer()) for asked in group]
    running = everyone
    while running:
        results = engine.step([generation for generation, _ in running])
        for (_, answer), result in zip(running, results, strict=True):
            _take(answer, result)
        running = [pair for pair in running if not pair[0].done]
    seconds = time.perf_counter() - started
    for generation, answer in everyone:
        answer.document_tokens = generation.counts.document_tokens
        yield answer, seconds / len(everyone)


def _request(asked: Asked, tokens: int) -> Generate:
    arrange = _in_order(asked.order) if asked.order else None
    return Generate(asked.question, tokens, top_k=asked.documents, arrange=arrange)


def _in_order(numbers: Sequence[int]) -> Arrange:
    def arrange(
        rank: Callable[[int], Sequence[RankedDocument]], limit: int
    ) -> Sequence[RankedDocument]:
        found = {document.number: document for document in rank(len(numbers))}
        return [found[number] for number in numbers if number in found][:limit]

    return arrange


def _take(answer: Answer, result: StepResult) -> None:
    if result.error is not None:
        raise result.error
    for event in result.events:
        if isinstance(event, TextEvent):
            answer.text += event.text
        elif isinstance(event, CitationEvent):
            answer.cited.append(event.number)
