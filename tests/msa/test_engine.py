"""The engine's promises: rows are independent, memories reload, limits hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.engine import (
    CitationEvent,
    DocumentText,
    DocumentTooLongError,
    Encoded,
    EngineError,
    Event,
    FinishEvent,
    FinishReason,
    Generate,
    LexicalPrior,
    QuestionTooLongError,
    RoutingEvent,
    TextEvent,
)
from model_adapter.msa.config import LayerChoice
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.prompt import Answering
from storage.layout import KVBlock
from tests.support.tiny_msa import (
    TEXTS,
    answer,
    finish,
    remember,
    tiny_engine,
    tiny_model,
)

QUESTION = "who was born in the old city?"
BOTH = pytest.mark.parametrize("answering", list(Answering))


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


def difference(a: KVBlock, b: KVBlock) -> float:
    worst = float(np.abs(a.routing_key_LCE - b.routing_key_LCE).max())
    worst = max(worst, float(np.abs(a.value_LCE - b.value_LCE).max()))
    if a.key_LCE is not None and b.key_LCE is not None:
        worst = max(worst, float(np.abs(a.key_LCE - b.key_LCE).max()))
    return worst


def by_number(encoded: Encoded) -> dict[int, KVBlock]:
    return {block.number: block for block in encoded.blocks}


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=2, max_size=9))
def test_a_document_does_not_know_its_batch(lengths: list[int]) -> None:
    engine = tiny_engine()
    documents = [
        DocumentText(number, "river city old bridge "[number % 7 :] * length)
        for number, length in enumerate(lengths, start=1)
    ]
    together = by_number(engine.encode(documents))
    for document in documents:
        (alone,) = engine.encode([document]).blocks
        alone.validate(engine.description.layout)
        assert difference(alone, together[document.number]) < 1e-5


def test_a_block_is_the_true_mean_of_its_chunk() -> None:
    long = DocumentText(2, TEXTS[2])
    (one,) = tiny_engine(pool_tokens=1).encode([long]).blocks
    for pool in (2, 16, 64):
        (pooled,) = tiny_engine(pool_tokens=pool).encode([long]).blocks
        for chunk in range(pooled.value_LCE.shape[1]):
            span = one.value_LCE[:, chunk * pool : (chunk + 1) * pool]
            np.testing.assert_allclose(pooled.value_LCE[:, chunk], span.mean(axis=1), atol=2e-6)


@pytest.mark.parametrize(
    ("msa", "separate"),
    [
        ({}, True),
        ({"decouple_router": False}, False),
        ({"decouple_router": False, "aux_loss_method": "INFONCE"}, True),
    ],
)
def test_blocks_survive_bytes(msa: dict[str, Any], separate: bool) -> None:
    engine = tiny_engine(**msa)
    layout = engine.description.layout
    assert layout.separate_routing_keys is separate
    blocks = by_number(engine.encode([DocumentText(n, text) for n, text in TEXTS.items()]))

    def through_bytes(array: np.ndarray) -> np.ndarray:
        return np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)

    reloaded = [
        KVBlock(
            block.number,
            block.tokens,
            through_bytes(block.routing_key_LCE),
            None if block.key_LCE is None else through_bytes(block.key_LCE),
            through_bytes(block.value_LCE),
        )
        for block in reversed(list(blocks.values()))
    ]
    first = InMemoryView(layout, list(blocks.values()), TEXTS)
    second = InMemoryView(layout, reloaded, TEXTS)
    assert engine.route(QUESTION, first, 9) == engine.route(QUESTION, second, 9)
    request = Generate(QUESTION, 12)
    assert answer(engine, request, first) == answer(engine, request, second)


@BOTH
def test_batch_is_as_alone(answering: Answering) -> None:
    engine = tiny_engine(answering)
    memory, other = remember(engine), remember(engine, {5: "Boats of the north."})
    requests = [
        (Generate(QUESTION, 14), memory),
        (Generate("Which garden?", 9, top_k=1), other),
        (Generate("x", 11, temperature=0.9, top_p=0.8, seed=7), memory),
        (Generate("The captain?", 5, top_k=40), memory),
    ]
    alone = [answer(engine, request, view) for request, view in requests]
    together = finish(engine, *(engine.start(request, view) for request, view in requests))
    for place, events in enumerate(alone):
        assert text_of(events) == text_of(together[place])
        assert events[-1] == together[place][-1]


@BOTH
def test_joining_and_leaving_between_steps(answering: Answering) -> None:
    engine = tiny_engine(answering)
    memory = remember(engine)
    expected = answer(engine, Generate(QUESTION, 16), memory)
    steady = engine.start(Generate(QUESTION, 16), memory)
    cancelled = engine.start(Generate("Which garden?", 16), memory)
    events: list[Event] = []
    late = None
    for step in range(200):
        running = [steady]
        if step < 5:
            running.append(cancelled)  # dropped mid-way afterwards, as a scheduler does
        if step == 7:
            late = engine.start(Generate("x", 4), memory)
        if late is not None and not late.done:
            running.insert(0, late)
        results = {id(result.generation): result for result in engine.step(running)}
        events += results[id(steady)].events
        if steady.done:
            break
    assert text_of(events) == text_of(expected)
    assert late is not None and late.counts.answer_tokens > 0


@pytest.mark.parametrize("slab_chunks", [1, 2, 5])
def test_slabs_are_as_one_slab(slab_chunks: int) -> None:
    engine = tiny_engine()
    whole, slabs = remember(engine), remember(engine, slab_chunks=slab_chunks)
    assert len(list(slabs.routing_keys(0))) > 1
    one, many = engine.route(QUESTION, whole, 9), engine.route(QUESTION, slabs, 9)
    assert [document.number for document in one] == [document.number for document in many]
    assert [d.score for d in one] == pytest.approx([d.score for d in many], abs=1e-5)


@BOTH
def test_a_memory_of_one_document_and_of_none(answering: Answering) -> None:
    engine = tiny_engine(answering)
    for texts, found in (({3: "x"}, [3]), ({}, [])):
        memory = remember(engine, texts)
        assert [document.number for document in engine.route(QUESTION, memory, 5)] == found
        events = answer(engine, Generate(QUESTION, 3, top_k=16), memory)
        assert isinstance(events[0], RoutingEvent)
        assert [document.number for document in events[0].documents] == found
        assert isinstance(events[-1], FinishEvent)


def test_only_selected_content_is_read() -> None:
    engine = tiny_engine(top_k=1)
    memory = remember(engine)
    events = answer(engine, Generate(QUESTION, 2), memory)
    assert isinstance(events[0], RoutingEvent)
    chosen = {document.number for document in events[0].documents}
    assert {int(memory.numbers_N[n]) for n in memory.content_read} == chosen
    assert len(chosen) < len(TEXTS)


def test_ranking_covers_all_documents_and_names_layers() -> None:
    engine = tiny_engine(top_k=2)
    ranked = engine.route(QUESTION, remember(engine), 50)
    assert sorted(document.number for document in ranked) == sorted(TEXTS)
    assert [d.score for d in ranked] == sorted((d.score for d in ranked), reverse=True)
    chosen = [(layer.layer, layer.rank) for document in ranked for layer in document.layers]
    assert sorted(chosen) == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert len(engine.route(QUESTION, remember(engine), 3)) == 3


@BOTH
def test_a_combined_choice_is_the_mean_of_all_layers(answering: Answering) -> None:
    engine = tiny_engine(answering, top_k=2, layer_choice=LayerChoice.COMBINED)
    memory = remember(engine)
    ranked = engine.route(QUESTION, memory, 50)
    assert [len(document.layers) for document in ranked] == [2, 2, 0, 0, 0]
    for document in ranked[:2]:
        scores = [layer.score for layer in document.layers]
        assert document.score == pytest.approx(sum(scores) / 2, abs=1e-6)
    # Scores of the lower layer are those of layers that choose apart: no content was read yet.
    apart, together = (
        tiny_engine(answering, top_k=5, layer_choice=choice).route(QUESTION, memory, 50)
        for choice in (LayerChoice.EACH, LayerChoice.COMBINED)
    )
    lower = {d.number: d.layers[0].score for d in apart}
    assert {d.number: d.layers[0].score for d in together} == lower
    memory.content_read.clear()
    events = answer(engine, Generate(QUESTION, 6), memory)
    assert isinstance(events[0], RoutingEvent)
    assert [d.number for d in events[0].documents] == [d.number for d in ranked[:2]]
    read = {int(memory.numbers_N[n]) for n in memory.content_read}
    attached = {d.number for d in ranked[:2]} if answering is Answering.INTERLEAVE else set()
    assert read == attached


def test_a_prior_moves_documents_up_and_is_told_of() -> None:
    engine = tiny_engine(Answering.ROUTED_TEXT)
    memory = remember(engine)
    alone = engine.route(QUESTION, memory, 50)
    last = alone[-1]
    prior = LexicalPrior(0.9, {last.number: 7.5, 999: 9.0})
    blended = engine.route(QUESTION, memory, 50, prior)
    assert sorted(d.number for d in blended) == sorted(TEXTS), "unknown numbers are passed over"
    assert blended[0].number == last.number
    assert blended[0].lexical_score == 7.5
    assert blended[0].routing_score == last.routing_score == last.score
    assert [d.number for d in blended[1:]] == [d.number for d in alone[:-1]]
    assert len(engine.route(QUESTION, memory, 1, prior)) == 1
    routing, citation, *_ = finish(
        engine, engine.start(Generate(QUESTION, 5, prior=prior), memory)
    )[0]
    assert isinstance(routing, RoutingEvent) and routing.lexical_weight == 0.9
    assert citation == CitationEvent(last.number, 1)


def test_routed_text_puts_in_what_fits_best_first() -> None:
    engine = tiny_engine(Answering.ROUTED_TEXT)
    memory = remember(engine)
    generation = engine.start(Generate(QUESTION, 5), memory)
    events = finish(engine, generation)[0]
    routing, *rest = events
    assert isinstance(routing, RoutingEvent)
    cited = [event.number for event in rest if isinstance(event, CitationEvent)]
    assert cited == [document.number for document in routing.documents][: len(cited)]
    assert cited == [d.number for d in engine.route(QUESTION, memory, 3)]
    counts = generation.counts
    assert counts.answer_tokens == 5 and counts.rounds == 1
    assert counts.routed_documents == len(TEXTS) and counts.document_tokens > 0
    assert counts.routed_chunks == memory.chunk_offsets_N1[-1]
    assert counts.routing_s > 0 and counts.question_tokens > 0
    assert events[-1] == FinishEvent(FinishReason.LENGTH)


def test_no_document_is_put_in_behind_enough_tokens_unless_so_many_are_asked_for() -> None:
    def cited(enough: int, top_k: int = 0) -> tuple[list[int], int]:
        model = tiny_model(Answering.ROUTED_TEXT)
        template = replace(model.template, documents=3, enough_tokens=enough)
        engine = MsaEngine(replace(model, template=template))
        generation = engine.start(Generate(QUESTION, 1, top_k=top_k), remember(engine))
        events = finish(engine, generation)[0]
        numbers = [event.number for event in events if isinstance(event, CitationEvent)]
        return numbers, generation.counts.document_tokens

    three, _ = cited(0)
    assert len(three) == 3
    one, tokens = cited(1)
    assert one == three[:1]
    assert cited(tokens)[0] == three[:1], "the first alone is enough"
    assert cited(tokens + 1)[0] == three[:2]
    assert cited(1, top_k=2)[0] == three[:2]
    assert cited(10_000)[0] == three


@pytest.mark.parametrize(("share", "declines"), [(0.0, False), (1e-7, True), (0.999, False)])
def test_an_answer_declines_when_that_is_likely_enough(share: float, declines: bool) -> None:
    model = tiny_model(Answering.ROUTED_TEXT)
    template = replace(model.template, unknown="museum", unknown_share=share)
    engine = MsaEngine(replace(model, template=template))
    events = finish(engine, engine.start(Generate(QUESTION, 3), remember(engine)))[0]
    text = "".join(event.text for event in events if isinstance(event, TextEvent))
    first = engine._model.prompts.text("museum")[:1]
    begins = text.startswith(engine._model.prompts.decode(first).strip())
    assert begins is declines, text


def test_limits_are_in_tokens() -> None:
    engine = tiny_engine(limits={"document_tokens": 40, "question_tokens": 6, "answer_tokens": 4})
    encoded = engine.encode([DocumentText(1, "boat"), DocumentText(2, TEXTS[2])])
    assert [block.number for block in encoded.blocks] == [1]
    (failure,) = encoded.failures
    assert failure.number == 2 and isinstance(failure.error, DocumentTooLongError)
    assert failure.error.metadata["limit"] == "40" and int(failure.error.metadata["actual"]) > 40
    memory = InMemoryView(engine.description.layout, encoded.blocks, {1: "boat"})
    for refused in (
        lambda: engine.start(Generate("word " * 30, 4), memory),
        lambda: engine.route("word " * 30, memory, 1),
    ):
        with pytest.raises(QuestionTooLongError):
            refused()
    generation = engine.start(Generate("boat?", 100), memory)
    finish(engine, generation)
    assert generation.counts.answer_tokens <= 4


def test_a_full_context_ends_the_answer() -> None:
    engine = tiny_engine(Answering.ROUTED_TEXT, limits={"positions": 60, "answer_tokens": 50})
    memory = remember(engine)
    generation = engine.start(Generate("boat?", 50), memory)
    events = finish(engine, generation)[0]
    assert isinstance(events[-1], FinishEvent)
    assert generation.counts.answer_tokens < 60


class BrokenView(InMemoryView):
    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise EngineError("a damaged block")


def test_a_broken_memory_ends_its_own_generation_alone() -> None:
    engine = tiny_engine()
    sound = remember(engine)
    encoded = engine.encode([DocumentText(n, text) for n, text in TEXTS.items()])
    broken = BrokenView(engine.description.layout, encoded.blocks, TEXTS)
    expected = answer(engine, Generate(QUESTION, 6), sound)
    good = engine.start(Generate(QUESTION, 6), sound)
    bad = engine.start(Generate(QUESTION, 6), broken)
    first = engine.step([bad, good])
    assert isinstance(first[0].error, EngineError) and bad.done
    assert first[1].error is None
    events = [*first[1].events, *finish(engine, good)[0]]
    assert text_of(events) == text_of(expected)
    with pytest.raises(ValueError, match="done"):
        engine.step([bad])


def test_sampling_follows_its_seed() -> None:
    engine = tiny_engine(Answering.ROUTED_TEXT)
    memory = remember(engine)

    def sampled(seed: int, top_p: float = 1.0) -> str:
        return text_of(answer(engine, Generate(QUESTION, 12, 0, 1.0, top_p, seed), memory))

    assert sampled(5) == sampled(5)
    assert len({sampled(seed) for seed in (1, 2, 3, 4)}) > 1
    greedy = text_of(answer(engine, Generate(QUESTION, 12), memory))
    assert sampled(9, top_p=1e-6) == greedy


def test_the_template_says_how_many_documents_are_put_in_unless_asked() -> None:
    model = tiny_model(Answering.ROUTED_TEXT)
    engine = MsaEngine(replace(model, template=replace(model.template, documents=1)))
    memory = remember(engine)

    def cited(top_k: int) -> int:
        events = answer(engine, Generate(QUESTION, 3, top_k=top_k), memory)
        assert isinstance(events[0], RoutingEvent)
        assert len(events[0].documents) == (top_k or 3), "the ranking is shown whole"
        return sum(isinstance(event, CitationEvent) for event in events)

    assert cited(0) == 1
    assert cited(2) == 2


def test_without_a_document_the_answer_is_that_it_is_not_known() -> None:
    model = tiny_model(Answering.ROUTED_TEXT)
    engine = MsaEngine(replace(model, template=replace(model.template, unknown="I don't know.")))
    empty = remember(engine, {})
    routing, *rest = answer(engine, Generate(QUESTION, 5), empty)
    assert isinstance(routing, RoutingEvent) and routing.documents == ()
    assert rest == [TextEvent("I don't know."), FinishEvent(FinishReason.STOP)]
    known = answer(engine, Generate(QUESTION, 5), remember(engine))
    assert TextEvent("I don't know.") not in known
