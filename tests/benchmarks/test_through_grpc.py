"""The harness through a whole service with the fake engine."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import banks
from benchmarks.quality.evaluate import Plan
from benchmarks.quality.through_grpc import measure
from model_adapter.fake import FakeEngine
from tests.support.tiny_banks import HARBOUR, asked, harbour, write_bank


def test_turns_and_texts_are_found_and_answered(tmp_path: Path) -> None:
    corpus = [
        {"doc_id": "a:1", "title": "8 May", "text": "Ines: Nothing new.", "conv": "a"},
        {"doc_id": "a:2", "text": "Ravi: I repaired a telescope.", "conv": "a"},
        {"doc_id": "a:s", "text": "[note]\nThe telescope cost ninety florins.", "conv": "a"},
        {"doc_id": "a:3", "text": "Ines: Carpets shrank overnight.", "conv": "a"},
        {"doc_id": "b:1", "text": "Ravi: I repaired a telescope.", "conv": "b"},
    ]
    answer = "Ravi: I repaired a telescope."
    questions = [
        asked("q1", "Who repaired something?", answer, "a:2", conv="a"),
        asked("q2", "Which carpets shrank?", "", "a:3", conv="a"),
        asked("q3", "How many florins?", "ninety", "a:s", conv="a"),
        asked("q4", "Who repaired something?", answer, "b:1", conv="b"),
    ]
    bank = banks.read(str(write_bank(tmp_path / "talk", corpus, questions)), tmp_path)
    plan = Plan(("ours",), answers=9, documents=1, answer_tokens=99)
    figures = measure(bank, plan, "fake", tmp_path / "data")
    ours = figures.rows["ours"].figures()
    assert ours["recall@1"] == 1.0
    assert ours["answers"] == 3 and ours["cites_gold"] == 1.0
    assert ours["exact_match"] == pytest.approx(2 / 3, abs=1e-4)
    assert (figures.documents, figures.refused) == (5, 0)
    assert figures.tokens == sum(
        len(document.text.split()) for scope in bank.scopes.values() for document in scope.documents
    )
    assert figures.model.identity == FakeEngine().description.identity


def test_the_command_goes_through_the_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bank", str(harbour(tmp_path)), "--model", "fake", "--through", "grpc", "--json"]
    options += ["--adapter", "none", "--rows", "ours,bm25,hybrid"]
    assert command.main(options) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["rows"]) == ["ours", "hybrid"]
    assert result["rows"]["hybrid"]["recall@5"] == 1.0
    assert result["rows"]["ours"]["recall@5"] == 1.0
    assert result["through"] == "grpc"
    assert result["documents"] == len(HARBOUR)
    assert result["bytes_per_token"] > 0 and result["encode_ms_per_token"] > 0
