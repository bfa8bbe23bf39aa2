"""Routing over keys on the device, in the engine: the formula's choice, whoever shares the pass.

The twin runs here everywhere; the kernels themselves in Triton's interpreter (or on a GPU).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model_adapter.engine import (
    DocumentText,
    EngineError,
    Generate,
    LexicalPrior,
    RankedDocument,
    RoutingEvent,
    TextEvent,
)
from model_adapter.msa import kernel_pass
from model_adapter.msa.boards import DeviceBoard, HostBoard, combined
from model_adapter.msa.config import LayerChoice
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.forward import RowRouting
from model_adapter.msa.kernel_choice import RoutingChoice, check, warm
from model_adapter.msa.kernels import Kernels, KeyFormat, KeyStorage, ResidentKeys, twin
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.pass_boards import Ranked, boards
from model_adapter.msa.prompt import Answering
from model_adapter.msa.ranking import combine
from tests.support.tiny_msa import TEXTS, answer, finish, tiny_engine, tiny_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' module is imported

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUESTION = "who was born in the old city?"
PLAIN = KeyStorage()
BOTH = pytest.mark.parametrize("answering", list(Answering))
CHOICES = pytest.mark.parametrize("choice", list(LayerChoice))


def engine_with(
    kernels: Kernels, answering: Answering = Answering.INTERLEAVE, **msa: Any
) -> MsaEngine:
    routing = RoutingChoice(kernels, None, "")
    return MsaEngine(tiny_model(answering, **msa), str(DEVICE), routing=routing)


def view(
    engine: MsaEngine, texts: dict[int, str] = TEXTS, storing: KeyStorage | None = PLAIN
) -> InMemoryView:
    encoded = engine.encode([DocumentText(number, text) for number, text in texts.items()])
    layout = engine.description.layout
    return InMemoryView(layout, encoded.blocks, texts, storing=storing, device=DEVICE)


def keys_of(memory: InMemoryView) -> ResidentKeys:
    resident = memory.resident_keys()
    assert resident is not None
    return resident


def close(ours: Sequence[RankedDocument], theirs: Sequence[RankedDocument]) -> None:
    assert [d.number for d in ours] == [d.number for d in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.routing_score == pytest.approx(other.routing_score, abs=1e-4)
        assert [(x.layer, x.rank) for x in one.layers] == [(x.layer, x.rank) for x in other.layers]
        for x, y in zip(one.layers, other.layers, strict=True):
            assert x.score == pytest.approx(y.score, abs=1e-4)


def text_of(events: Sequence[object]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


@CHOICES
@pytest.mark.parametrize("kernels", list(Kernels))
def test_the_choice_is_the_formulas(kernels: Kernels, choice: LayerChoice) -> None:
    if kernels is Kernels.FUSED:
        pytest.importorskip("triton")
    msa: dict[str, Any] = {"layer_choice": choice, "top_k": 2}
    formula, ours = tiny_engine(**msa), engine_with(kernels, **msa)
    memory = view(formula)
    close(ours.route(QUESTION, memory, 5), formula.route(QUESTION, memory, 5))
    prior = LexicalPrior(0.6, {7: 3.0, 3: 1.0, 99: 9.0})
    close(ours.route(QUESTION, memory, 4, prior), formula.route(QUESTION, memory, 4, prior))


@BOTH
@CHOICES
def test_rows_that_route_together_answer_as_alone(
    answering: Answering, choice: LayerChoice
) -> None:
    msa: dict[str, Any] = {"layer_choice": choice, "top_k": 2}
    formula, ours = tiny_engine(answering, **msa), engine_with(Kernels.TWIN, answering, **msa)
    memory, other = view(formula), view(formula, {5: "Boats of the north.", 6: "The old mill."})
    streamed = view(formula, storing=None)
    requests = [
        (Generate(QUESTION, 9), memory),
        (Generate("Which garden?", 7, top_k=1), other),
        (Generate("x", 5), view(formula, {})),
        (Generate("The captain?", 5, top_k=40), memory),
        (Generate("The captain?", 5), streamed),
    ]
    expected = [answer(formula, request, place) for request, place in requests]
    together = finish(ours, *(ours.start(request, place) for request, place in requests))
    for place, events in enumerate(expected):
        assert text_of(together[place]) == text_of(events)
        found, wanted = together[place][0], events[0]
        assert isinstance(found, RoutingEvent) and isinstance(wanted, RoutingEvent)
        close(found.documents, wanted.documents)


@CHOICES
@pytest.mark.parametrize("coarse", [KeyFormat.INT8, KeyFormat.INT4])
def test_two_stages_choose_as_the_formula_does(
    coarse: KeyFormat, choice: LayerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_pass, "_SURVIVORS", 12)
    monkeypatch.setattr(kernel_pass, "_SURVIVORS_EACH", 6)
    msa: dict[str, Any] = {"layer_choice": choice, "top_k": 2}
    formula, ours = tiny_engine(**msa), engine_with(Kernels.TWIN, **msa)
    texts = {n: f"{TEXTS[n % 2 + 1][n % 11 :]} {n}" for n in range(1, 40)}
    exact = view(formula, texts)
    group = formula.description.layout.head_dim
    two_stage = view(formula, texts, KeyStorage(coarse, group, exact=True))
    wanted, found = (
        engine.route(QUESTION, memory, 2)
        for engine, memory in ((formula, exact), (ours, two_stage))
    )
    assert [d.number for d in found] == [d.number for d in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert [(x.layer, x.rank) for x in one.layers] == [(x.layer, x.rank) for x in other.layers]
        for x, y in zip(one.layers, other.layers, strict=True):
            assert x.score == pytest.approx(y.score, abs=1e-4), "exact, not coarse"


@CHOICES
def test_a_memory_of_some_documents_is_as_one_that_never_held_the_others(
    choice: LayerChoice,
) -> None:
    ours = engine_with(Kernels.TWIN, layer_choice=choice, top_k=2)
    whole, kept = view(ours), [1, 4, 7]
    fewer = view(ours, {n: TEXTS[n] for n in kept})
    whole_keys = keys_of(whole)

    class Only(InMemoryView):
        def resident_keys(self) -> ResidentKeys | None:
            return whole_keys.only(np.searchsorted(whole.numbers_N, kept))

    blocks = ours.encode([DocumentText(n, TEXTS[n]) for n in kept]).blocks
    masked = Only(ours.description.layout, blocks, TEXTS)
    close(ours.route(QUESTION, masked, 5), ours.route(QUESTION, fewer, 5))


def test_the_kernels_leave_out_documents_that_do_not_count() -> None:
    pytest.importorskip("triton")
    engines = {one: engine_with(one, top_k=2) for one in Kernels}
    plain = engines[Kernels.TWIN]
    resident = keys_of(view(engines[Kernels.TWIN]))

    class Only(InMemoryView):
        def resident_keys(self) -> ResidentKeys | None:
            return resident.only(np.array([1, 2, 4]))

    blocks = plain.encode([DocumentText(n, TEXTS[n]) for n in (2, 3, 7)]).blocks
    masked = Only(plain.description.layout, blocks, TEXTS)
    ours = engines[Kernels.FUSED].route(QUESTION, masked, 5)
    close(ours, plain.route(QUESTION, masked, 5))


class BrokenView(InMemoryView):
    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise EngineError("a damaged block")


def test_a_broken_memory_ends_its_own_row_of_a_shared_pass() -> None:
    engine = engine_with(Kernels.TWIN)
    encoded = engine.encode([DocumentText(n, text) for n, text in TEXTS.items()])
    layout = engine.description.layout
    broken = BrokenView(layout, encoded.blocks, TEXTS, storing=PLAIN, device=DEVICE)
    sound = view(engine)
    expected = answer(engine, Generate(QUESTION, 6), sound)
    bad, good = (engine.start(Generate(QUESTION, 6), memory) for memory in (broken, sound))
    first = engine.step([bad, good])
    assert isinstance(first[0].error, EngineError) and bad.done
    assert first[1].error is None
    assert text_of([*first[1].events, *finish(engine, good)[0]]) == text_of(expected)


def test_boards_agree_with_ties_and_equal_layers() -> None:
    generator = torch.Generator().manual_seed(4)
    layers = {layer: torch.randint(-3, 3, (40,), generator=generator) / 2 for layer in (2, 5)}
    layers[7] = torch.full((40,), 1.5)  # says nothing: its spread is zero
    routing = RowRouting({layer: scores.numpy() for layer, scores in layers.items()})
    host = HostBoard(combine(routing), routing.scores_N)
    some = {2: np.array([3, 1]), 5: np.array([], dtype=np.int64), 7: np.array([9])}
    others = np.array([0, 39])
    flat = {layer: torch.cat((-scores, scores)) for layer, scores in layers.items()}
    rows = [Ranked(40 * place, 40, some, others) for place in range(2)]
    _, told = boards(flat, rows, together=False)
    asked = DeviceBoard(
        flat, 40, combined(torch.stack(list(layers.values()))[:, None], together=False), 0
    )
    for device in (told, asked):
        np.testing.assert_allclose(device.at(range(40)), host.at(range(40)), atol=1e-6)
        for k in (1, 7, 40, 50):
            assert host.best(k).tolist() == device.best(k).tolist()
        for layer, scores in host.layers_at(some).items():
            np.testing.assert_array_equal(device.layers_at(some)[layer], scores)
        assert device.layers_at({2: np.array([5])})[2] == host.layers_at({2: np.array([5])})[2]


@pytest.mark.parametrize("to", [KeyFormat.INT4])
def test_a_worker_looks_whether_the_kernels_compute_right(
    to: KeyFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    assert check(KeyStorage(to, 32), 64, torch.float32, DEVICE) == ""
    warm(KeyStorage(to, 32), 64, torch.float32, DEVICE)
    right = twin.score
    monkeypatch.setattr(twin, "score", lambda *known: right(*known) * 1.01)
    assert "differ" in check(KeyStorage(to, 32), 64, torch.float32, DEVICE)
