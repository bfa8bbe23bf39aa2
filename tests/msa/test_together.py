"""Questions that come together: few passes and launches for all of them, and answers as alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_adapter.engine import (
    DocumentText,
    EngineError,
    Generate,
    Generation,
    LexicalPrior,
    MemoryView,
    RoutingEvent,
    TextEvent,
)
from model_adapter.msa.config import LayerChoice
from model_adapter.msa.decode_step import Way
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingChoice
from model_adapter.msa.kernels import Kernels, KeyStorage
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.phases import Phases
from model_adapter.msa.prompt import Answering
from tests.support.tiny_msa import TEXTS, answer, finish, tiny_engine, tiny_model

BOTH = pytest.mark.parametrize("answering", list(Answering))
CHOICES = pytest.mark.parametrize("choice", list(LayerChoice))
QUESTIONS = ("who was born in the old city?", "Which garden?", "x", "The captain?", "the boat")


def engine_of(
    answering: Answering, *, pooled: bool = True, tokens: int = 10_000, **msa: Any
) -> MsaEngine:
    """As on a GPU: rows in a pool, routing over keys on the device. tokens: of prompts a step."""
    way, kernels = (Way.PADDED, Kernels.TWIN) if pooled else (None, None)
    routing = RoutingChoice(kernels, None, "")
    engine = MsaEngine(tiny_model(answering, **msa), routing=routing, pooled=way)
    engine._prefill_tokens = tokens
    return engine


def view(engine: MsaEngine, texts: dict[int, str] = TEXTS) -> InMemoryView:
    encoded = engine.encode([DocumentText(number, text) for number, text in texts.items()])
    return InMemoryView(engine.description.layout, encoded.blocks, texts, storing=KeyStorage())


def asked(n: int, **options: Any) -> Generate:
    return Generate(f"{QUESTIONS[n % len(QUESTIONS)]} {n % 3}", 6 + n % 3, **options)


def text_of(events: Sequence[object]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


class Launches(TorchDispatchMode):
    """Counts operators that compute something: what a GPU would be asked to launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts[str(func)] += 1
        return out


def launches(engine: MsaEngine, memory: MemoryView, questions: int) -> list[Counter[str]]:
    """Of each of the first three steps: to route, to read the prompts, to decode."""
    sessions = [engine.start(asked(3 * n), memory) for n in range(questions)]
    found = []
    for _ in range(3):
        with Launches() as seen:
            engine.step(sessions)
        found.append(seen.counts)
    return found


@BOTH
@CHOICES
def test_many_questions_cost_as_many_launches_as_two(
    answering: Answering, choice: LayerChoice
) -> None:
    engine = engine_of(answering, layer_choice=choice, top_k=2)
    memory = view(engine)
    for questions in (9, 2):  # the pool has grown, and batches of both sizes were made
        launches(engine, memory, questions)
    assert launches(engine, memory, 2) == launches(engine, memory, 9)


@BOTH
@CHOICES
@pytest.mark.parametrize("pooled", [True, False])
def test_many_questions_share_their_passes(
    answering: Answering, choice: LayerChoice, pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(answering, pooled=pooled, layer_choice=choice)
    decoder, passes = engine._model.decoder, list[int]()
    embed = decoder.embed

    def counted(ids_T: torch.Tensor) -> torch.Tensor:
        passes.append(len(ids_T))
        return embed(ids_T)

    memory, few = view(engine), list[list[int]]()
    monkeypatch.setattr(decoder, "embed", counted)
    for questions in (1, 7):
        sessions = [engine.start(asked(n), memory) for n in range(questions)]
        few.append([])
        for _ in range(3):
            passes.clear()
            engine.step(sessions)
            few[-1].append(len(passes))
    assert few[0] == few[1]
    # Layers that choose together do so before the pass that reads what they chose.
    ahead = choice is LayerChoice.COMBINED and answering is Answering.INTERLEAVE
    assert few[1] == [2 if ahead else 1, 1, 1]


@BOTH
@CHOICES
@pytest.mark.parametrize("tokens", [40, 10_000])
def test_an_answer_does_not_know_whom_it_came_with(
    answering: Answering, choice: LayerChoice, tokens: int
) -> None:
    """Whoever came before, beside or after, over which memory; with room for all prompts or few."""
    engine = engine_of(answering, tokens=tokens, layer_choice=choice, top_k=2)
    plain = tiny_engine(answering, layer_choice=choice, top_k=2)
    memories = [view(engine), view(engine, {5: "Boats.", 6: "The old mill."}), view(engine, {})]
    prior = LexicalPrior(0.5, {7: 3.0, 3: 1.0, 99: 9.0})
    requests = [
        (asked(n, prior=prior if n == 4 else None, top_k=n % 4), memories[(n % 5) % 3])
        for n in range(7)
    ]
    alone = [answer(plain, request, memory) for request, memory in requests]
    random = Random(7)
    for _ in range(2):
        order = random.sample(range(len(requests)), len(requests))
        running, found = dict[int, Generation](), {n: list[Any]() for n in order}
        waiting = list(order)
        while waiting or running:
            for n in waiting[: random.randrange(4)]:
                running[n] = engine.start(*requests[n])
                waiting.remove(n)
            results = engine.step(list(running.values()))
            for (n, session), result in zip(list(running.items()), results, strict=True):
                assert result.error is None
                found[n] += result.events
                if session.done:
                    del running[n]
        for n, events in enumerate(alone):
            assert text_of(found[n]) == text_of(events)
            assert found[n][-1] == events[-1]
            ours, theirs = found[n][0], events[0]
            assert isinstance(ours, RoutingEvent) and isinstance(theirs, RoutingEvent)
            assert [d.number for d in ours.documents] == [d.number for d in theirs.documents]
            scores = [document.score for document in theirs.documents]
            assert [d.score for d in ours.documents] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("pooled", [True, False])
def test_answers_go_on_while_prompts_wait_and_none_is_passed(pooled: bool) -> None:
    engine = engine_of(Answering.ROUTED_TEXT, pooled=pooled, tokens=1)
    memory = view(engine)
    first = engine.start(Generate("x", 30), memory)
    engine.step([first])
    engine.step([first])
    later = [engine.start(asked(n), memory) for n in range(4)]
    begun = list[int]()
    for step in range(1, 9):
        engine.step([first, *(one for one in later if not one.done)])
        assert first.counts.answer_tokens == 1 + step, "a token a step, whoever waits"
        begun += [n for n, one in enumerate(later) if one.counts.rounds and n not in begun]
        assert sum(one.counts.rounds for one in later) <= step
    assert begun == [0, 1, 2, 3]


def test_what_several_chose_is_read_once() -> None:
    engine = engine_of(Answering.INTERLEAVE, top_k=2)
    read = list[tuple[int, tuple[int, ...]]]()

    class Watched(InMemoryView):
        def content(
            self, layer: int, documents: Sequence[int]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            read.append((layer, tuple(documents)))
            return super().content(layer, documents)

    encoded = engine.encode([DocumentText(number, text) for number, text in TEXTS.items()])
    layout = engine.description.layout
    memory = Watched(layout, encoded.blocks, TEXTS, storing=KeyStorage())
    engine.step([engine.start(asked(n), memory) for n in range(6)])
    assert [layer for layer, _ in read] == [0, 1]
    assert all(list(documents) == sorted(set(documents)) for _, documents in read)


def test_a_damaged_document_ends_those_who_chose_it() -> None:
    engine = engine_of(Answering.INTERLEAVE)
    memory = view(engine)
    requests = [asked(n, top_k=1 + n % 3) for n in range(6)]
    chosen = []
    for request in requests:
        routing = answer(engine, request, memory)[0]
        assert isinstance(routing, RoutingEvent)
        chosen.append({document.number for document in routing.documents})
    damaged = min(chosen[0].union(*chosen) - chosen[0].intersection(*chosen))

    class Damaged(InMemoryView):
        def content(
            self, layer: int, documents: Sequence[int]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if damaged in self.numbers_N[list(documents)]:
                raise EngineError("a damaged block")
            return super().content(layer, documents)

    encoded = engine.encode([DocumentText(number, text) for number, text in TEXTS.items()])
    layout = engine.description.layout
    broken = Damaged(layout, encoded.blocks, TEXTS, storing=KeyStorage())
    results = engine.step([engine.start(request, broken) for request in requests])
    failed = [result.error is not None for result in results]
    assert failed == [damaged in numbers for numbers in chosen]


def test_phases_add_up_to_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("model_adapter.msa.phases.time.perf_counter", lambda: float(next(clock)))
    phases = Phases(torch.device("cpu"))
    with phases("prefill"):
        with phases("fetch"):
            pass
        with phases("fetch"):
            pass
    assert dict(phases.seconds) == {"prefill": 3.0, "fetch": 2.0}
    assert phases.turns == {"prefill": 1, "fetch": 2}


@pytest.mark.parametrize("pooled", [True, False])
def test_passes_say_what_they_are_at(pooled: bool) -> None:
    engine = engine_of(Answering.INTERLEAVE, pooled=pooled)
    memory = view(engine)
    phases = Phases(torch.device("cpu"))
    engine._model.decoder.phase = phases
    finish(engine, engine.start(asked(0), memory))
    wanted = {"prefill", "rows", "routing", "fetch"} | ({"decode"} if pooled else set())
    assert set(phases.seconds) == wanted
