"""A step computes what serving computes, and trains what the layout says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from model_adapter.checkpoints import load_gguf, read_adapter, write_adapter
from model_adapter.engine import DocumentText
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.memory import InMemoryView
from model_adapter.training import losses
from model_adapter.training import run as runs
from model_adapter.training.answers import REFUSAL, AnswerRows
from model_adapter.training.batch import Batch, Batcher
from model_adapter.training.corpus import document_tokens, query_tokens
from model_adapter.training.exporting import header_of
from model_adapter.training.sampler import MAX_GOLD, Drawn, Sampler, pad_to
from model_adapter.training.step import Step
from tests.support.training_sets import tiny_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    whole = {"max_document": "400", "max_question": "150", "document_tokens": "1500"}
    return runs.prepare(tiny_settings(tmp_path_factory.mktemp("step"), **whole))


def _batch(run: runs.Run, step: int = 0, *, constant: bool = False) -> tuple[Drawn, Batch]:
    head = run.prompts.template.head
    drawn = Sampler(run.corpus, run.settings, len(head)).draw(step)
    rows = AnswerRows(run.corpus, run.settings, run.prompts).draw(step)
    return drawn, Batcher(run.corpus, run.settings, head, constant=constant).make(drawn, rows)


def _scatter(run: runs.Run, seed: int = 5) -> None:
    """Gives every master a value that shows, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, master in run.trainable.masters.items():
            if name != "scale":
                master.copy_(torch.randn(master.shape, generator=generator) * 0.15)


def test_draws_fit_and_hold_their_gold(run: runs.Run) -> None:
    corpus, s = run.corpus, run.settings
    sampler = Sampler(corpus, s, len(run.prompts.template.head))
    for step in range(20):
        drawn = sampler.draw(step)
        assert drawn == sampler.draw(step)
        assert len(set(drawn.documents)) == len(drawn.documents)
        assert len(set(drawn.queries)) == len(drawn.queries) > 3
        assert sum(len(corpus.tokens[n]) for n in drawn.documents) <= s.document_tokens
        for n in drawn.queries:
            assert set(corpus.queries[n].gold) <= set(drawn.documents)
            assert len(corpus.queries[n].gold) <= MAX_GOLD
    assert sampler.draw(1) != sampler.draw(2)
    held = {query.text for query in corpus.held_out}
    assert held and not held & {query.text for query in corpus.queries if not query.made_up}


def test_relevance_knows_gold_and_conversations(run: runs.Run) -> None:
    corpus = run.corpus
    for step in range(8):
        drawn, batch = _batch(run, step)
        for row, n in enumerate(drawn.queries):
            query = corpus.queries[n]
            for column, document in enumerate(drawn.documents):
                gold = document in query.gold
                assert bool(batch.positive_QD[row, column]) == gold
                same_set = corpus.placed[document] == query.source
                other = corpus.scope_N[document] != corpus.scope_N[query.gold[0]]
                assert bool(batch.ignored_QD[row, column]) == bool(same_set and other and not gold)


def test_constant_streams_change_nothing(run: runs.Run) -> None:
    _scatter(run)
    step = Step(run.decoder, run.settings)
    weights = run.settings.losses.main
    found = []
    for constant in (False, True):
        _, batch = _batch(run, constant=constant)
        run.trainable.install()
        found.append(step.run(batch, weights, run.trainable.scale).parts)
        if constant:
            sizes = [sum(stream.lengths) for stream in batch.streams]
            s = run.settings
            assert sizes == [s.document_tokens, s.query_tokens, s.answer_tokens]
    for name, part in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(part), rel=0.02, abs=0.02), name


@pytest.mark.parametrize("int8", [False, True])
def test_scores_of_a_step_are_those_of_the_engine(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    """Trained masters, exported, loaded by the engine: the same ranking of the same documents."""
    _scatter(run)
    corpus = run.corpus
    drawn, batch = _batch(run)
    seen: list[torch.Tensor] = []
    original = losses.document_scores

    def keep(*arguments: torch.Tensor, mean_tokens: bool) -> torch.Tensor:
        seen.append(original(*arguments, mean_tokens=mean_tokens))
        return seen[-1]

    monkeypatch.setattr(losses, "document_scores", keep)
    with torch.no_grad():
        run.trainable.install()
        Step(run.decoder, run.settings).run(batch, run.settings.losses.main, run.trainable.scale)
    assert len(seen) == len(run.layout.routed_layers)
    combined_QD = torch.stack(seen).mean(0).numpy()

    path = tmp_path / "a.safetensors"
    header = header_of(run.settings, run.base, run.layout, 1, corpus.report)
    write_adapter(path, header, run.trainable.tensors(), int8=int8)
    base = Path(run.settings.base)
    engine = MsaEngine(load_gguf(base, "bf16", adapter=read_adapter(path)))
    # Numbers are drawn anew for each document, so that two of a batch may share one.
    columns = {corpus.numbers[n]: column for column, n in enumerate(drawn.documents)}
    assert len(columns) > 5
    texts = {
        number: corpus.documents[drawn.documents[column]].text for number, column in columns.items()
    }
    blocks = engine.encode([DocumentText(n, text) for n, text in texts.items()]).blocks
    view = InMemoryView(engine.description.layout, blocks, texts)
    for row, n in enumerate(drawn.queries[:12]):
        ranked = {d.number: d.score for d in engine.route(corpus.queries[n].text, view, 100)}
        ours = [ranked[number] for number in columns]
        np.testing.assert_allclose(ours, combined_QD[row, list(columns.values())], atol=0.03)


def test_gradients_reach_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    run = runs.prepare(tiny_settings(tmp_path, first_delta_layer="1"))
    _scatter(run)
    assert run.layout.delta_layers == (1, 2)
    before = [layer.fused.clone() for layer in run.decoder.layers]
    run.trainable.install()
    _, batch = _batch(run)
    outcome = Step(run.decoder, run.settings).run(
        batch, run.settings.losses.main, run.trainable.scale
    )
    torch.autograd.backward([outcome.total])
    for name, master in run.trainable.masters.items():
        assert master.grad is not None and float(master.grad.abs().sum()) > 0, name
    assert torch.equal(run.decoder.layers[0].fused, before[0])
    assert not run.decoder.layers[0].fused.requires_grad
    assert not run.decoder.embedding_VM.requires_grad


def test_answer_rows_end_with_their_targets(run: runs.Run) -> None:
    rows = AnswerRows(run.corpus, run.settings, run.prompts).draw(3)
    assert rows == AnswerRows(run.corpus, run.settings, run.prompts).draw(3)
    assert rows and sum(len(row.ids) for row in rows) <= run.settings.answer_tokens
    prompts = run.prompts
    for row in rows:
        answer = prompts.decode(row.ids[-row.targets :])
        assert row.ids[-1:] == prompts.template.turn_end
        asked = prompts.decode(row.ids[: -row.targets])
        assert answer == REFUSAL or answer in asked
        shown = {int(number) for number in re.findall(r"\[(\d+)\]\. ", asked)}
        assert shown <= set(run.corpus.numbers), "a place in the row would tell the gold document"
    _, batch = _batch(run, 3)
    assert batch.answers is not None
    following = batch.answers.ids_T[batch.at_A + 1]
    assert torch.equal(following, batch.targets_A)


def test_cut_documents_and_questions_keep_their_ends(run: runs.Run) -> None:
    prompts = run.prompts
    whole = prompts.document(7, "the garden " * 40)
    ids, is_whole = document_tokens(prompts, 7, "the garden " * 40, 30)
    assert not is_whole and len(ids) == 30
    assert list(ids[:20]) == whole[:20] and list(ids[-3:]) == whole[-3:]
    assert document_tokens(prompts, 7, "x", 30) == (tuple(prompts.document(7, "x")), True)
    asked = prompts.question("the garden " * 20)[0].ids
    cut = query_tokens(prompts, "the garden " * 20, 9)
    assert (list(cut[:8]), cut[-1]) == (list(asked[:8]), asked[-1])


def test_filler() -> None:
    assert pad_to([5, 3], 30, 10) == [10, 10, 2]
    assert pad_to([5, 5], 10, 4) == []


def test_steps_compile_once_and_evaluation_never(
    run: runs.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = run.decoder
    for name in ("_before_attention", "_after_attention"):
        monkeypatch.setattr(decoder, name, getattr(decoder, name))  # put back afterwards
    torch._dynamo.reset()
    counters.clear()
    decoder.compile(backend="eager")
    graphs = []
    for step in range(3):
        _, batch = _batch(run, step, constant=True)
        run.trainable.install()
        scale = run.trainable.scale
        outcome = Step(decoder, run.settings).run(batch, run.settings.losses.main, scale)
        torch.autograd.backward([outcome.total])
        graphs.append(counters["stats"]["unique_graphs"])
    assert 2 < graphs[0] <= 8, "torch's own limit is 8 a function"
    assert graphs == graphs[:1] * 3
    assert runs.evaluate(run, 1).keys() == runs.evaluate(run).keys()
    assert counters["stats"]["unique_graphs"] == graphs[0]
    _, varying = _batch(run, 5)
    Step(decoder, run.settings).run(varying, run.settings.losses.main, run.trainable.scale)
    assert counters["stats"]["unique_graphs"] > graphs[0], "other sizes are counted"
