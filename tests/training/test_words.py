"""BM25 as a teacher: the package's own scores, over the most that a question could reach."""

from __future__ import annotations

import sys
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer
import torch

from model_adapter.training import run as runs
from model_adapter.training.ahead import Maker
from model_adapter.training.errors import SettingsError
from model_adapter.training.step import Step
from model_adapter.training.words import WordScores
from tests.support.training_sets import tiny_settings

DOCUMENTS = [
    "The lighthouse keeper walks to the harbour.",
    "A harbour with many boats, and boats again.",
    "Nothing here is alike.",
    "the of and",
]
QUESTIONS = [
    "Who walks to the lighthouse?",
    "boats in harbours",
    "zebra crossing",
    "the",
    "boat boat harbour",
]


def test_scores_are_bm25_over_the_most_there_is() -> None:
    found = WordScores.build(DOCUMENTS, QUESTIONS).scores(range(5), range(4))
    options = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "return_ids": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(DOCUMENTS, **options, show_progress=False), show_progress=False)
    asked = bm25s.tokenize(QUESTIONS, **options, show_progress=False)
    for row, words in zip(found, asked, strict=True):
        known = [word for word in words if word in index.vocab_dict]
        if not known:
            assert row.tolist() == [0.0] * 4
            continue
        counts = [sum(word in d.lower() for d in DOCUMENTS) for word in known]
        most = sum(np.log(1 + (4 - n + 0.5) / (n + 0.5)) for n in counts)
        np.testing.assert_allclose(row, index.get_scores(known) / most, rtol=1e-5)
    assert found.min() >= 0.0
    assert found.max() < 1.0
    assert found.argmax(1)[:2].tolist() == [0, 1]


def test_any_rows_and_columns_in_any_order() -> None:
    words = WordScores.build(DOCUMENTS, QUESTIONS)
    whole = words.scores(range(5), range(4))
    np.testing.assert_array_equal(
        words.scores([4, 0, 2], [3, 1, 0]), whole[[4, 0, 2]][:, [3, 1, 0]]
    )
    again = WordScores.unpack(words.pack())
    np.testing.assert_array_equal(again.scores(range(5), range(4)), whole)
    assert words.scores([2, 3], [0, 1]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_without_its_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(SettingsError, match="extra `training`"):
        WordScores.build(DOCUMENTS, QUESTIONS)


def test_a_run_is_taught_by_words_alone(tmp_path: Path) -> None:
    run = runs.prepare(tiny_settings(tmp_path, words="1"))
    batch = Maker(run.corpus, run.settings, run.prompts, constant=False).make(0)
    assert batch.teacher_QD is None
    assert batch.words_QD is not None
    assert batch.words_QD.shape == batch.positive_QD.shape
    gold = batch.words_QD[batch.positive_QD].mean()
    assert float(gold) > 2 * float(batch.words_QD[~batch.positive_QD].mean())
    outcome = Step(run.decoder, run.settings).run(
        batch, run.settings.losses.main, torch.tensor(20.0)
    )
    assert float(outcome.parts["teacher"]) > 0
    again = runs.prepare(tiny_settings(tmp_path, words="1"))
    repeated = Maker(again.corpus, again.settings, again.prompts, constant=False).make(0)
    assert repeated.words_QD is not None
    assert torch.equal(repeated.words_QD, batch.words_QD)
