"""The harness proves itself on banks whose figures are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import banks
from benchmarks.quality.answers import Asked, answer_all
from benchmarks.quality.encoded import BlockCache, EncodedView
from benchmarks.quality.evaluate import Evaluation, Plan
from model_adapter.engine import Arrange, LexicalPrior, MemoryView, RankedDocument
from model_adapter.fake import FakeEngine, FakeSpec
from tests.support.tiny_banks import HARBOUR, HARBOUR_QUESTIONS, asked, harbour, write_bank

OURS_AND_GOLD = Plan(("ours", "gold"), answers=9, documents=1, answer_tokens=99, batch=2)


class Scripted(FakeEngine):
    """Routes as it is told: numbers by question."""

    def __init__(self, rankings: dict[str, list[int]]) -> None:
        super().__init__()
        self._rankings = rankings

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        found = self._rankings[question][:limit]
        return [RankedDocument(number, -float(place), ()) for place, number in enumerate(found)]


def figures(folder: Path, bank: banks.Bank, plan: Plan, engine: FakeEngine | None = None) -> Any:
    evaluated = Evaluation(engine or FakeEngine(), bank, plan, folder / "cache").run()
    return {row: tally.figures() for row, tally in evaluated.rows.items()}


def test_perfect_retrieval_has_recall_one(tmp_path: Path) -> None:
    found = figures(tmp_path, banks.read(str(harbour(tmp_path)), tmp_path), OURS_AND_GOLD)
    for cutoff in (1, 5, 10):
        assert found["ours"][f"recall@{cutoff}"] == 1.0
        assert found["gold"][f"recall@{cutoff}"] is None
    # The fake engine quotes its best document: right twice, wrong for q3.
    for row in ("ours", "gold"):
        assert found[row]["answers"] == 3
        assert found[row]["exact_match"] == pytest.approx(2 / 3, abs=1e-4)
        assert found[row]["f1"] == pytest.approx(2 / 3, abs=1e-4)
        assert found[row]["cites_gold"] == 1.0
        assert found[row]["documents_put_in"] == 1.0
        assert found[row]["answer_seconds"] > 0


def test_a_known_wrong_ranking_has_the_known_figures(tmp_path: Path) -> None:
    corpus = [{"doc_id": f"d{n}", "text": f"text {n}"} for n in range(1, 13)]
    gold = {
        "first": ["d1"],
        "third": ["d3"],
        "eighth": ["d8"],
        "never": ["d12"],
        "half": ["d2", "d12"],
    }
    questions = [asked(name, name, "", *ids) for name, ids in gold.items()]
    bank = banks.read(str(write_bank(tmp_path / "wrong", corpus, questions)), tmp_path)
    engine = Scripted({question: list(range(1, 12)) for question in gold})
    found = figures(tmp_path, bank, Plan(("ours",)), engine)["ours"]
    assert found["recall@1"] == pytest.approx(1 / 5)
    assert found["recall@5"] == pytest.approx((1 + 1 + 0.5) / 5)
    assert found["recall@10"] == pytest.approx((1 + 1 + 1 + 0.5) / 5)
    assert found["answers"] == 0 and found["f1"] is None


def test_answers_of_another_ranking_come_from_its_documents(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    bank = banks.read(str(harbour(tmp_path)), tmp_path)
    wrong = Scripted({question.text: [4, 3] for question in bank.questions})
    plan = Plan(("ours", "bm25"), answers=2, documents=1, answer_tokens=99)
    found = figures(tmp_path, bank, plan, wrong)
    assert found["ours"]["recall@5"] == pytest.approx(1 / 3, abs=1e-4)  # q3 alone
    assert found["bm25"]["recall@1"] == 1.0
    assert found["bm25"]["cites_gold"] == 1.0
    assert found["bm25"]["answers"] == 2


def test_what_is_put_in_first_is_another_ranking_s_first(tmp_path: Path) -> None:
    bank = banks.read(str(harbour(tmp_path)), tmp_path)
    engine, texts = FakeEngine(), bank.scopes[""].texts()
    encoded = BlockCache(tmp_path / "blocks", engine).encode(texts)
    question = "Who painted turbines in Skarholm?"  # two words of d1, one of d2
    for order, first in (((), 1), ((1, 2), 1), ((2, 1), 2), ((4, 2, 1), 2)):
        asked_over = Asked(question, EncodedView(encoded, texts), 0, order)
        ((answer, _),) = answer_all(engine, [asked_over], tokens=99)
        assert answer.cited == [first]


def test_a_question_is_asked_over_its_own_conversation(tmp_path: Path) -> None:
    text = "Brundage painted turbines."
    corpus = [{"doc_id": f"{conv}:1", "text": text, "conv": conv} for conv in "ab"]
    corpus += [{"doc_id": "b:2", "text": "Something else.", "conv": "b"}]
    questions = [asked(f"q{c}", "Who painted turbines?", text, f"{c}:1", conv=c) for c in "ab"]
    bank = banks.read(str(write_bank(tmp_path / "two", corpus, questions)), tmp_path)
    found = figures(tmp_path, bank, OURS_AND_GOLD)
    assert found["ours"]["recall@1"] == 1.0  # in one memory of both, one of the two would be second
    assert found["ours"]["exact_match"] == 1.0


def test_a_refused_document_is_counted_and_not_found(tmp_path: Path) -> None:
    bank = banks.read(str(harbour(tmp_path)), tmp_path)
    engine = FakeEngine(FakeSpec(max_document_tokens=4))
    evaluated = Evaluation(engine, bank, OURS_AND_GOLD, tmp_path / "cache").run()
    assert evaluated.refused == 3  # all but the carpets have five words
    assert evaluated.tokens == 4
    assert evaluated.rows["ours"].figures()["recall@10"] == 0.0


def test_the_command_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bank", str(harbour(tmp_path)), "--model", "fake", "--rows", "ours,gold"]
    options += ["--cache", str(tmp_path / "cache"), "--answers", "2", "--documents", "1"]
    assert command.main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bank"] == "harbour"
    assert (result["documents"], result["questions"], result["scopes"]) == (4, 3, 1)
    assert result["rows"]["ours"]["recall@5"] == 1.0
    assert result["rows"]["gold"]["answers"] == 2
    layout = FakeEngine().description.layout
    words = sum(len(row["text"].split()) for row in HARBOUR)
    assert result["tokens"] == words
    assert result["bytes_per_token"] == round(4 * layout.block_bytes(1) / words, 1)
    assert result["encode_ms_per_token"] > 0
    assert command.main(options) == 0
    table = capsys.readouterr().out
    assert "harbour: 3 questions, 4 documents" in table
    assert "| ours | 1.000 | 1.000 | 1.000 |" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bank", "atlantis"], "BankError: no bank 'atlantis'"),
        (["--bank", "BANK", "--model", "nowhere.gguf"], "UnusableModelError"),
    ],
)
def test_what_cannot_be_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    bank = str(harbour(tmp_path))
    given = [bank if option == "BANK" else option for option in options]
    given += ["--rows", "ours", "--data", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    assert command.main(given) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--bank", "x", "--rows", "ours,colbert"])
    assert "colbert is none of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--bank", "x", "--rows", "bm25,gold", "--through", "grpc"])
    assert "has the rows ours and hybrid" in capsys.readouterr().err


def test_questions_without_answers_are_not_answered(tmp_path: Path) -> None:
    questions = [*HARBOUR_QUESTIONS[:1], asked("q9", "Which carpets shrank?", "", "d4")]
    bank = banks.read(str(write_bank(tmp_path / "some", HARBOUR, questions)), tmp_path)
    found = figures(tmp_path, bank, OURS_AND_GOLD)
    assert found["ours"]["recall@1"] == 1.0
    assert found["ours"]["answers"] == 1


def test_over_a_memory_without_its_gold_documents_only_declining_is_right(tmp_path: Path) -> None:
    corpus = [
        {"doc_id": "d1", "text": "Brundage painted turbines."},
        {"doc_id": "d2", "text": "I don't know who painted walnuts."},
        {"doc_id": "d3", "text": "Vestibule carpets shrank."},
    ]
    questions = [
        asked("q1", "Who painted turbines?", "Brundage", "d1"),
        asked("q2", "Which carpets shrank?", "Vestibule", "d3"),
    ]
    bank = banks.read(str(write_bank(tmp_path / "gone", corpus, questions)), tmp_path)
    plan = Plan(("ours", "without"), answers=2, documents=1, answer_tokens=99)
    found = figures(tmp_path, bank, plan)
    assert found["ours"]["cites_gold"] == 1.0 and found["ours"]["declines"] == 0.0
    # q1 now finds the painted walnuts; for q2 nothing is left, and the fake engine says
    # that it found nothing.
    assert found["without"]["cites_gold"] == 0.0
    assert found["without"]["declines"] == 0.5
    assert found["without"]["recall@5"] is None
