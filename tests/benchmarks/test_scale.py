"""Dilution: which passages, which groups, known figures, and the chart."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import plot, scale
from benchmarks.quality import banks
from benchmarks.quality.banks import BankError
from benchmarks.scale import Dilution, fall, passages
from model_adapter.engine import Arrange, LexicalPrior, MemoryView, RankedDocument
from model_adapter.fake import FakeEngine
from tests.support.tiny_banks import asked, write_bank

WORDS = ("walnut", "turbine", "florin", "carpet", "lantern", "harbour", "violin", "beehive")
SIZES = {"100": 100, "400": 400}


def write(folder: Path) -> None:
    """Eight gold documents of ten words, and sixty passages of ten other words."""
    corpus = [
        {"doc_id": f"g{n}", "title": f"Title {n}", "text": f"{word} " + "plaintively " * 7}
        for n, word in enumerate(WORDS)
    ]
    questions = [asked(f"q{n}", f"Where is the {w}?", w, f"g{n}") for n, w in enumerate(WORDS)]
    write_bank(folder / "tools", corpus, questions)
    others = [
        {"doc_id": f"w{n}", "title": f"Other {n}", "text": f"number{n} " + "stone " * 7}
        for n in range(60)
    ]
    copies = [
        {"doc_id": "c1", "title": "TITLE 3", "text": "another part of the same page"},
        {"doc_id": "c2", "title": "", "text": corpus[2]["text"].upper() + "and more"},
    ]
    write_bank(folder / "wiki.00", [*others[:30], copies[0]], [])
    write_bank(folder / "wiki.01", [*others[30:], copies[1]], [], compressed=True)


def read(folder: Path) -> tuple[banks.Bank, list[str]]:
    write(folder)
    bank = banks.read("tools", folder)
    return bank, passages("wiki", folder, bank.scopes[""].documents, seed=1)


def test_passages_are_shuffled_once_and_have_no_copies(tmp_path: Path) -> None:
    bank, others = read(tmp_path)
    documents = bank.scopes[""].documents
    assert len(others) == len(set(others)) == 60
    assert not any("same page" in text or "WALNUT" in text for text in others)
    assert others == passages("wiki", tmp_path, documents, seed=1)
    assert others != passages("wiki", tmp_path, documents, seed=2)
    assert sorted(others) == sorted(passages("wiki", tmp_path, documents, seed=2))


def test_no_passages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no passages"):
        passages("wiki", tmp_path, [], seed=1)


def test_a_group_fills_half_of_the_smallest_size(tmp_path: Path) -> None:
    bank, others = read(tmp_path)
    dilution = Dilution(FakeEngine(), bank, others, tmp_path / "cache", SIZES)
    assert [len(group.questions) for group in dilution.groups] == [5, 3]  # ten tokens each
    smaller, larger = (dilution.memory(dilution.groups[1], size) for size in SIZES.values())
    assert 90 <= smaller.tokens <= 100 and 390 <= larger.tokens <= 400
    assert set(smaller.numbers_N) < set(larger.numbers_N)
    assert list(smaller.numbers_N[:3]) == [6, 7, 8]  # the other group's gold is not there


class Early(FakeEngine):
    """Finds the right document in a memory of few documents only."""

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        if len(memory.numbers_N) > 20:
            return []
        return super().route(question, memory, limit, prior, arrange)


def test_known_figures_and_their_fall(tmp_path: Path) -> None:
    bank, others = read(tmp_path)
    whole = Dilution(FakeEngine(), bank, others, tmp_path / "cache", SIZES).measure(["ours"])
    assert [whole[name]["ours"]["recall@5"] for name in SIZES] == [1.0, 1.0]
    assert fall(whole, "ours") == 0.0
    early = Dilution(Early(), bank, others, tmp_path / "cache", SIZES).measure(["ours"])
    assert [early[name]["ours"]["recall@5"] for name in SIZES] == [1.0, 0.0]
    assert fall(early, "ours") == 1.0


def test_too_few_passages_are_refused(tmp_path: Path) -> None:
    bank, others = read(tmp_path)
    with pytest.raises(BankError, match="not 9000"):
        Dilution(FakeEngine(), bank, others, tmp_path / "cache", {"9K": 9_000})


def test_conversations_are_refused(tmp_path: Path) -> None:
    corpus = [{"doc_id": c, "text": "Ines: hello.", "conv": c} for c in "ab"]
    questions = [asked(f"q{c}", "Who?", "Ines", c, conv=c) for c in "ab"]
    bank = banks.read(str(write_bank(tmp_path / "talk", corpus, questions)), tmp_path)
    with pytest.raises(BankError, match="conversations"):
        Dilution(FakeEngine(), bank, ["text"], tmp_path / "cache", SIZES)


def test_the_command_prints_one_object_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bm25s")
    write(tmp_path)
    options = ["--bank", "tools", "--data", str(tmp_path), "--distractors", "wiki"]
    options += ["--model", "fake", "--cache", str(tmp_path / "cache"), "--sizes", "100,400"]
    assert scale.main([*options, "--svg", str(tmp_path / "recall.svg"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["questions"], result["groups"]) == (8, 2)
    for row in ("ours", "bm25", "hybrid"):
        assert result["sizes"]["400"][row]["recall@5"] == 1.0
        assert result["fall_of_recall@5"][row] == 0.0
    assert svg(tmp_path / "recall.svg").tag.endswith("svg")
    assert scale.main([*options, "--distractors", "nothing"]) == 2
    assert "BankError: no passages" in capsys.readouterr().err


def svg(path: Path) -> Any:
    return ElementTree.fromstring(path.read_text())


def test_a_chart_places_its_points(tmp_path: Path) -> None:
    ticks = {"1K": 1e3, "10K": 1e4, "100K": 1e5}
    lines = {"ours <b>": [(1e3, 1.0), (1e4, 0.5), (1e5, 0.0)], "bm25": [(1e3, 0.0), (1e5, 0.0)]}
    path = tmp_path / "chart.svg"
    path.write_text(plot.shares("A & B", "tokens", ticks, lines))
    root = svg(path)
    name = "{http://www.w3.org/2000/svg}"
    first, second = root.findall(f"{name}polyline")
    (x1, y1), (x2, y2), (x3, y3) = (
        tuple(map(float, point.split(","))) for point in first.get("points").split()
    )
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # a logarithmic axis
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
    assert (y1, y3) == (plot.TOP, plot.HEIGHT - plot.BOTTOM)
    assert len(second.get("points").split()) == 2
    texts = [text.text for text in root.findall(f"{name}text")]
    assert {"A & B", "ours <b>", "bm25", "1K", "100K", "tokens"} <= set(texts)
    labels = [t for t in root.findall(f"{name}text") if t.text in lines]
    assert abs(float(labels[0].get("y")) - float(labels[1].get("y"))) >= 15


def test_a_chart_of_one_size(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    path.write_text(plot.shares("One", "tokens", {"1K": 1e3}, {"ours": [(1e3, 0.5)], "none": []}))
    assert len(svg(path).findall("{http://www.w3.org/2000/svg}circle")) == 1
