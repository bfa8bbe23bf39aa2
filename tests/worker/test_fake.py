"""The fake engine: deterministic, sensitive to wrong blocks, honest about its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model_adapter.engine import (
    CitationEvent,
    DocumentText,
    Event,
    FinishEvent,
    FinishReason,
    Generate,
    RoutingEvent,
    TextEvent,
)
from model_adapter.fake import NOTHING_FOUND, FakeEngine, FakeSpec
from model_adapter.msa.memory import InMemoryView
from storage.layout import KVBlock
from tests.support.blocks import same_block
from tests.support.jobs import events_alone

TEXTS = [
    "Anna bought a red sailing boat in Kiel",
    "Bob's boat needs paint",
    "Carla plays chess on Fridays",
]


def view_of(texts: Sequence[str], engine: FakeEngine | None = None) -> InMemoryView:
    engine = engine or FakeEngine()
    documents = [DocumentText(number, text) for number, text in enumerate(texts, 1)]
    blocks = engine.encode(documents).blocks
    return InMemoryView(engine.description.layout, blocks, dict(enumerate(texts, 1)))


def events(question: str, texts: Sequence[str] = TEXTS, **request: Any) -> list[Event]:
    engine = FakeEngine()
    asked = replace(Generate(question, max_answer_tokens=0), **request)
    return events_alone(engine, asked, view_of(texts))


def text_of(found: Sequence[Event]) -> str:
    return "".join(event.text for event in found if isinstance(event, TextEvent))


def test_blocks_fit_the_layout_and_depend_on_number_and_text_alone() -> None:
    engine = FakeEngine()
    long = DocumentText(7, "word " * 100)
    (block,) = engine.encode([long]).blocks
    block.validate(engine.description.layout)
    assert same_block(block, FakeEngine().encode([DocumentText(1, "x"), long]).blocks[1])
    (moved,) = engine.encode([replace(long, number=8)]).blocks
    assert not same_block(replace(block, number=8), moved)


def test_a_name_makes_another_model() -> None:
    own, other = FakeEngine().description, FakeEngine(FakeSpec.parse("fake:name=b")).description
    assert (other.model_id, other.layout) == ("fake-b", own.layout)
    assert own.identity != other.identity
    assert FakeEngine(FakeSpec(step_ms=3)).description == own


@pytest.mark.parametrize(
    ("question", "number"),
    [("What did ANNA buy, a boat?", 1), ("Does Bob's boat need paint?", 2), ("chess", 3)],
)
def test_the_best_document_is_quoted_and_cited(question: str, number: int) -> None:
    found = events(question)
    assert isinstance(found[0], RoutingEvent)
    assert found[0].documents[0].number == number
    assert CitationEvent(number, 1) in found
    assert text_of(found) == TEXTS[number - 1]
    assert found[-1] == FinishEvent(FinishReason.STOP)


def test_nothing_shared_is_nothing_found() -> None:
    for found in (events("Why is the sky blue?"), events("boat", [])):
        assert text_of(found) == NOTHING_FOUND
        assert not any(isinstance(event, CitationEvent) for event in found)


def test_limits_are_kept() -> None:
    found = events("boat", max_answer_tokens=3)
    assert text_of(found) == " ".join(text_of(found).split()[:3])
    assert found[-1] == FinishEvent(FinishReason.LENGTH)
    (routing,) = [event for event in events("boat", top_k=1) if isinstance(event, RoutingEvent)]
    assert len(routing.documents) == 1


def test_rounds_cite_one_document_each() -> None:
    found = events("boat", max_rounds=5)
    cited = [event for event in found if isinstance(event, CitationEvent)]
    assert [event.round for event in cited] == [1, 2]
    assert {event.number for event in cited} == {1, 2}
    assert found[-1] == FinishEvent(FinishReason.STOP)
    assert events("boat", max_rounds=1)[-1] == FinishEvent(FinishReason.ROUNDS)


@pytest.mark.parametrize(("gone", "said"), [({1}, NOTHING_FOUND), ({2}, TEXTS[0])])
def test_a_document_deleted_since_it_was_routed_is_left_out(gone: set[int], said: str) -> None:
    engine = FakeEngine()
    blocks = engine.encode([DocumentText(n, t) for n, t in enumerate(TEXTS, 1)]).blocks
    left = {n: text for n, text in enumerate(TEXTS, 1) if n not in gone}
    view = InMemoryView(engine.description.layout, blocks, left)
    assert text_of(events_alone(engine, Generate("Anna boat", 0), view)) == said


def test_a_wrong_block_is_noticed() -> None:
    """One bit of content, two blocks swapped, routing keys for another text."""
    engine = FakeEngine()
    blocks = engine.encode([DocumentText(n, t) for n, t in enumerate(TEXTS, 1)]).blocks
    flipped = blocks[0].value_LCE.copy()
    flipped[1, 0, 5] ^= np.uint16(1)
    texts = dict(enumerate(TEXTS, 1))
    for wrong in (
        replace(blocks[0], value_LCE=flipped),
        replace(blocks[0], key_LCE=blocks[2].key_LCE),
        replace(blocks[0], value_LCE=blocks[2].value_LCE),
    ):
        assert isinstance(wrong, KVBlock)
        view = InMemoryView(engine.description.layout, [wrong, *blocks[1:]], texts)
        generation = engine.start(Generate("Anna", 0), view)
        (result,) = engine.step([generation])
        assert result.error is not None
        assert generation.done


@pytest.mark.parametrize("text", ["fake:", "fake:name=a,step_ms=2.5,top_k=3", "fake"])
def test_specifications(text: str) -> None:
    spec = FakeSpec.parse(text)
    assert spec == (FakeSpec("a", 2.5, top_k=3) if "name" in text else FakeSpec())


@pytest.mark.parametrize("text", ["fakes", "fake:x=1", "fake:top_k", "fake:top_k=many"])
def test_specifications_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        FakeSpec.parse(text)
