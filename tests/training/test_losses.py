"""Losses against their formulas, written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.training import losses
from model_adapter.training.losses import Relevance


def _random(
    seed: int, queries: int, documents: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(queries, documents, generator=generator) * 4
    positive = torch.rand(queries, documents, generator=generator) < 0.3
    positive[:, 0] = True
    ignored = (torch.rand(queries, documents, generator=generator) < 0.2) & ~positive
    return logits, positive, ignored


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), queries=st.integers(1, 5), documents=st.integers(1, 7))
def test_contrastive_is_the_published_formula(seed: int, queries: int, documents: int) -> None:
    logits, positive, ignored = _random(seed, queries, documents)
    expected = 0.0
    for q in range(queries):
        negatives = [
            math.exp(logits[q, d])
            for d in range(documents)
            if not (positive[q, d] or ignored[q, d])
        ]
        terms = [
            -math.log(math.exp(logits[q, d]) / (math.exp(logits[q, d]) + sum(negatives)))
            for d in range(documents)
            if positive[q, d]
        ]
        expected += sum(terms) / len(terms) / queries
    found = losses.contrastive(logits, Relevance(positive, ignored))
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_gradients_are_finite_where_all_else_is_ignored() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    positive = torch.tensor([[True, False, False], [True, True, True]])
    ignored = torch.tensor([[False, True, True], [False, False, False]])
    loss = losses.contrastive(logits, Relevance(positive, ignored))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()


def test_false_negatives_are_what_the_teacher_ranks_above_gold() -> None:
    positive = torch.tensor([[True, False, False, False], [True, True, False, False]])
    teacher = torch.tensor([[0.5, 0.61, 0.59, 0.1], [0.9, 0.3, 0.45, 0.35]])
    found = losses.without_false_negatives(positive, torch.zeros_like(positive), teacher)
    assert found.ignored_QD.tolist() == [[False, True, False, False], [False, False, True, False]]
    unchanged = losses.without_false_negatives(positive, ~positive, None)
    assert torch.equal(unchanged.ignored_QD, ~positive)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), mean_tokens=st.booleans())
def test_scores_are_maxima_over_tokens_and_chunks(seed: int, mean_tokens: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(3, 4, 6, generator=generator)
    keys = torch.randn(5, 6, generator=generator)
    slots = torch.arange(4)[None, :] < torch.tensor([4, 1, 2])[:, None]
    chunks = torch.tensor([[0, 0, 0], [1, 2, 3], [4, 4, 4]])
    found = losses.document_scores(query, slots, keys, chunks, mean_tokens=mean_tokens)
    for q in range(3):
        for d, own in enumerate(([0], [1, 2, 3], [4])):
            tokens = [query[q, s] for s in range(4) if slots[q, s]]
            each = [[float(t @ keys[c]) for t in tokens] for c in own]
            reduced = [sum(row) / len(row) if mean_tokens else max(row) for row in each]
            assert float(found[q, d]) == pytest.approx(max(reduced), abs=1e-5)


def test_distillation_is_zero_at_the_teacher_and_positive_elsewhere() -> None:
    logits, _, _ = _random(3, 4, 5)
    teacher = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    at_it = losses.distillation(teacher / losses.TEACHER_TEMPERATURE + 3.0, teacher)
    assert float(at_it) == pytest.approx(0.0, abs=1e-5)
    assert float(losses.distillation(logits, teacher)) > 0.1


def test_teachers_are_blended_by_the_words_share() -> None:
    cosines, words = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.0, 0.6]])
    both = losses.taught(cosines, words, 0.25)
    assert both is not None
    torch.testing.assert_close(both, torch.tensor([[0.6, 0.3]]))
    assert losses.taught(cosines, None, 0.25) is cosines
    assert losses.taught(None, words, 0.25) is words
    assert losses.taught(None, None, 0.25) is None


def test_answers_are_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    found = losses.answers(logits, torch.tensor([0, 0]))
    assert float(found) == pytest.approx(expected, rel=1e-6)
