"""The second teacher: how much of a question's words a document has, by BM25.

BM25 by the package bm25s, extras `training` and `quality`: Lucene's form, English stems, the
same for the benchmarks. A score is divided by the most that the question's words could reach,
so that it lies between 0 and 1 as a cosine does and the two can be blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from model_adapter.training.errors import SettingsError
from model_adapter.training.prepared import Arrays

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """The stems of each text's words, without English stop words. Raises ImportError."""
    # ruff: noqa: PLC0415  # an optional extra: imported only where it is used
    import bm25s
    import Stemmer

    found: list[list[str]] = bm25s.tokenize(
        list(texts),
        stopwords="en",
        stemmer=Stemmer.Stemmer("english"),
        return_ids=False,
        show_progress=False,
    )
    return found


def index_of(texts: Sequence[str]) -> Any:
    """BM25 of the package over texts in their order. Raises ImportError."""
    import bm25s

    index = bm25s.BM25()
    index.index(words_of(texts), show_progress=False)
    return index


@dataclass(frozen=True)
class _Lists:
    """Lists of numbers behind each other; ends[n] is where the n-th one ends."""

    values: npt.NDArray[Any]
    ends: Integers

    def take(self, places: Sequence[int]) -> tuple[Integers, Integers]:
        """Where in `values` the lists at these places stand, and which list each is of."""
        at = np.asarray(places, dtype=np.int64)
        starts = np.where(at > 0, self.ends[at - 1], 0)
        counts = self.ends[at] - starts
        of = np.repeat(np.arange(len(at)), counts)
        first = np.cumsum(counts) - counts
        return np.arange(int(counts.sum())) - first[of] + starts[of], of


@dataclass(frozen=True)
class WordScores:
    """BM25 between every question and every document.

    words of documents and of questions are numbers of one vocabulary; weights: a document's
    word's part of the score; most: what a word adds to it at most.
    """

    document_words: _Lists
    question_words: _Lists
    weights: Floats
    most: Floats

    @classmethod
    def build(cls, documents: Sequence[str], questions: Sequence[str]) -> Self:
        """Of all texts. Raises SettingsError without the packages."""
        try:
            index = index_of(documents)
        except ImportError as error:
            raise SettingsError(
                f"the words' teacher needs the extra `training` ({error}); or set words = 0"
            ) from error
        vocabulary: dict[str, int] = index.vocab_dict
        asked = [
            [vocabulary[word] for word in words if word in vocabulary]
            for words in words_of(questions)
        ]
        bounds = np.asarray(index.scores["indptr"], dtype=np.int64)
        frequency = bounds[1:] - bounds[:-1]
        holders = np.asarray(index.scores["indices"], dtype=np.int64)
        by_document = np.argsort(holders, kind="stable")
        held = np.repeat(np.arange(len(frequency)), frequency)[by_document]
        ends = np.cumsum(np.bincount(holders, minlength=len(documents)))
        rarity = (len(documents) - frequency + 0.5) / (frequency + 0.5)
        return cls(
            _Lists(held.astype(np.int32), ends),
            _Lists(
                np.fromiter((word for words in asked for word in words), np.int32),
                np.cumsum([len(words) for words in asked], dtype=np.int64),
            ),
            np.asarray(index.scores["data"], dtype=np.float32)[by_document],
            np.log1p(rarity).astype(np.float32),
        )

    @classmethod
    def unpack(cls, arrays: Arrays) -> Self:
        """What `pack` packed."""
        return cls(
            _Lists(arrays["documents"], arrays["documents.ends"]),
            _Lists(arrays["questions"], arrays["questions.ends"]),
            arrays["weights"],
            arrays["most"],
        )

    def pack(self) -> Arrays:
        """For a file."""
        return {
            "documents": self.document_words.values,
            "documents.ends": self.document_words.ends,
            "questions": self.question_words.values,
            "questions.ends": self.question_words.ends,
            "weights": self.weights,
            "most": self.most,
        }

    def scores(self, questions: Sequence[int], documents: Sequence[int]) -> Floats:
        """[Q, D] between 0 and 1: BM25 over the most that the question's words can add up to;
        0 for a question none of whose words is in any document."""
        at, asker = self.question_words.take(questions)
        asked = self.question_words.values[at]
        vocabulary, column = np.unique(asked, return_inverse=True)
        counts_QW = np.zeros((len(questions), len(vocabulary)), dtype=np.float32)
        np.add.at(counts_QW, (asker, column), 1.0)
        weights_DW = np.zeros((len(documents), len(vocabulary)), dtype=np.float32)
        at, holder = self.document_words.take(documents)
        held = self.document_words.values[at]
        known = np.isin(held, vocabulary)
        place = np.searchsorted(vocabulary, held[known])
        weights_DW[holder[known], place] = self.weights[at[known]]
        most_Q = counts_QW @ self.most[vocabulary]
        found: Floats = (counts_QW @ weights_DW.T) / np.maximum(most_Q, 1e-6)[:, None]
        return found
