"""A filtered memory ranks and answers as a memory that holds what matches and nothing else.

With the fake engine and with a tiny MSA model; as of an earlier document, and after deletions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_adapter.beside import Beside
from model_adapter.blending import DEPTH
from model_adapter.engine import (
    DocumentText,
    Engine,
    Event,
    Generate,
    LexicalPrior,
    MemoryView,
    RankedDocument,
    RoutingEvent,
)
from model_adapter.fake import NOTHING_FOUND, FakeEngine
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingChoice
from model_adapter.msa.kernels import Kernels, KeyStorage
from model_adapter.msa.prompt import Answering
from storage.documents import Conversation, Role, Source, Turn, render
from storage.filters import DocumentFilter, matches
from storage.store import EncodingId, StoredDocument
from tests.support import filtered
from tests.support.pages import World, key, uid
from tests.support.tiny_msa import tiny_engine, tiny_model

NAME = key(1)


@dataclass
class Asked:
    """A memory of one engine's, as a worker reads it. resident: its keys lie as kernels read."""

    engine: Engine
    documents: Mapping[int, Source]
    resident: bool = False
    world: World = field(init=False)

    def __post_init__(self) -> None:
        known = self.engine.description
        self.world = World(known.layout, encoding=EncodingId(bytes.fromhex(known.identity)[:16]))
        if self.resident:
            self.world.pager = self.world.new_pager(self.world.budgets, KeyStorage())
        store = self.world.store()
        texts = [DocumentText(n, render(source)) for n, source in self.documents.items()]
        store.put_documents(
            uid(NAME), [StoredDocument(n, n, 0, source) for n, source in self.documents.items()]
        )
        blocks = self.engine.encode(texts).blocks if texts else []
        store.put_blocks(uid(NAME), self.world.encoding, known.layout, blocks)

    def delete(self, numbers: set[int]) -> None:
        self.world.store().delete_documents(uid(NAME), sorted(numbers))

    @contextmanager
    def seen(
        self, question: str, weight: float, wanted: DocumentFilter | None, last: int, epoch: int = 0
    ) -> Iterator[tuple[MemoryView, LexicalPrior | None]]:
        beside = Beside(question, DEPTH, weight, wanted)
        with self.world.pager.lease(NAME, last, epoch) as lease:
            view = beside.view(lease, lambda: False)
            yield view, beside.prior(lease, view, lambda: False) if weight else None


@cache
def engines() -> dict[str, Engine]:
    return {
        "fake": FakeEngine(),
        "interleave": tiny_engine(Answering.INTERLEAVE),
        "routed text": tiny_engine(Answering.ROUTED_TEXT, top_k=2),
        "kernels": MsaEngine(
            tiny_model(Answering.INTERLEAVE), routing=RoutingChoice(Kernels.TWIN, None, "")
        ),
    }


EACH = pytest.mark.parametrize("kind", list(engines()))


def same(found: list[RankedDocument], alone: list[RankedDocument]) -> None:
    """Equal documents and scores; what scores alike to the last bits may change places."""
    assert len(found) == len(alone)
    for mine, theirs in zip(found, alone, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-4)
    other = {document.number: document for document in alone}
    for document in found:
        if document.number not in other:
            assert document.score == pytest.approx(alone[-1].score, abs=1e-4)
            continue
        theirs = other[document.number]
        assert document.score == pytest.approx(theirs.score, abs=1e-4)
        assert document.routing_score == pytest.approx(theirs.routing_score, abs=1e-4)
        assert document.lexical_score == pytest.approx(theirs.lexical_score, abs=1e-4)


def layer_scores(engine: Engine, question: str, view: MemoryView) -> dict[int, list[float]]:
    """Of the documents that each layer chose, as the layer scored them, best first."""
    layers: dict[int, list[float]] = {}
    for document in engine.route(question, view, 50):
        for own in document.layers:
            layers.setdefault(own.layer, []).append(own.score)
    return {layer: sorted(scores, reverse=True) for layer, scores in layers.items()}


def told_apart(layers: Mapping[int, Sequence[float]]) -> bool:
    """Whether no layer scores its two best so alike that rounding decides between them: scores are
    standardised over a memory's documents, which makes as much of that as of any difference."""
    return all(
        high - low > 0.02 * max(abs(high), abs(low))
        for high, low in (scores[:2] for scores in layers.values() if len(scores) > 1)
    )


def answer(
    engine: Engine, question: str, view: MemoryView, prior: LexicalPrior | None
) -> list[Event]:
    generation = engine.start(Generate(question, 8, top_k=2, max_rounds=3, prior=prior), view)
    events: list[Event] = []
    while not generation.done:
        (result,) = engine.step([generation])
        assert result.error is None
        events += result.events
    return events


@EACH
@given(
    documents=filtered.memories,
    wanted=filtered.filters,
    last=st.integers(0, 13),
    deleted=st.sets(st.integers(1, 12), max_size=3),
    question=filtered.sentences,
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    limit=st.sampled_from([1, 3, 50]),
)
def test_ranking_is_that_of_what_matches_alone(
    kind: str,
    documents: dict[int, Source],
    wanted: DocumentFilter,
    last: int,
    deleted: set[int],
    question: str,
    weight: float,
    limit: int,
) -> None:
    engine = engines()[kind]
    whole = Asked(engine, documents, kind == "kernels")
    deleted &= documents.keys()
    epoch = 0
    if deleted:
        with whole.seen(question, weight, wanted, 99):
            pass  # read once before: what is deleted must be forgotten
        whole.delete(deleted)
        epoch = 1
    left = {n: source for n, source in documents.items() if n <= last and n not in deleted}
    alone = Asked(engine, {n: source for n, source in left.items() if matches(wanted, source)})
    with (
        whole.seen(question, weight, wanted, last, epoch) as (view, prior),
        alone.seen(question, weight, None, 99) as (expected, expected_prior),
    ):
        assert view.numbers_N.tolist() == expected.numbers_N.tolist()
        found = engine.route(question, view, limit, prior)
        other = engine.route(question, expected, limit, expected_prior)
        mine, theirs = (layer_scores(engine, question, seen) for seen in (view, expected))
        assert mine.keys() == theirs.keys()
        for layer, scores in mine.items():
            assert scores == pytest.approx(theirs[layer], abs=1e-4)
        if told_apart(theirs):
            same(found, other)
        else:
            assert len(found) == len(other)
            assert {d.number for d in found} <= set(expected.numbers_N.tolist())
    whole.world.pager.check_integrity()


PLACES = ("Lisbon", "Kiel", "Graz", "Oslo", "Vienna", "Turin", "Ghent", "Bern")
TALKS: dict[int, Source] = {
    number: Conversation(
        (
            Turn(
                Role.USER, f"I took the night train to {place} and saw {number} boats.", None, who
            ),
            Turn(Role.ASSISTANT, f"What did you do in {place}?"),
        )
    )
    for number, (place, who) in enumerate(zip(PLACES, ("Anna", "Bob") * 4, strict=True), 1)
}
BOB = DocumentFilter(speakers=frozenset(["Bob"]))


@EACH
def test_the_top_k_is_full_and_the_answer_is_the_same(kind: str) -> None:
    engine, question = engines()[kind], "When did he take the night train to Lisbon?"
    whole = Asked(engine, TALKS, kind == "kernels")
    alone = Asked(engine, {n: source for n, source in TALKS.items() if matches(BOB, source)})
    for weight in (0.0, 0.6):
        with (
            whole.seen(question, weight, BOB, 8) as (view, prior),
            alone.seen(question, weight, None, 8) as (expected, expected_prior),
        ):
            found = engine.route(question, view, 3, prior)
            other = engine.route(question, expected, 3, expected_prior)
            assert [d.number for d in found] == [d.number for d in other]
            assert len(found) == 3 and {d.number for d in found} < {2, 4, 6, 8}
            events = answer(engine, question, view, prior)
            same_events = answer(engine, question, expected, expected_prior)
            assert [brief(e) for e in events] == [brief(e) for e in same_events]
            assert isinstance(events[0], RoutingEvent) and len(events[0].documents) >= 2


def brief(event: Event) -> object:
    """What has to be the same; scores may differ in their last bits."""
    return [d.number for d in event.documents] if isinstance(event, RoutingEvent) else event


@EACH
def test_nothing_matches(kind: str) -> None:
    engine = engines()[kind]
    nobody = DocumentFilter(speakers=frozenset(["Nobody"]))
    with Asked(engine, TALKS).seen("the night train?", 0.6, nobody, 8) as (view, prior):
        assert engine.route("the night train?", view, 3, prior) == []
        events = answer(engine, "the night train?", view, prior)
        assert isinstance(events[0], RoutingEvent) and events[0].documents == ()
        if kind == "fake":
            said = "".join(getattr(event, "text", "") for event in events)
            assert said == NOTHING_FOUND
