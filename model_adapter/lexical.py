"""Words of a memory: a full-text index that a question is ranked by, beside routing.

SQLite's FTS5, in this process's memory and nowhere else: BM25 over stemmed words, and
documents are added as they come. It holds an inverted index, not the texts.
"""

from __future__ import annotations

import math
import re
import sqlite3
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+")
#: Distinct words of a question that are looked for; the rest of a very long one is not.
MAX_WORDS = 128

#: FTS5's own constants of BM25, and its weight of a word that more than half of the documents hold.
_K1, _B, _FREQUENT = 1.2, 0.75, 1e-6

_TOKENIZER = "content='', tokenize='porter unicode61'"
_SET_UP = (
    # Nothing is rolled back, and what is dropped is overwritten with zeros.
    "PRAGMA journal_mode = OFF",
    "PRAGMA secure_delete = ON",
    # A sort that grows must not go to a file.
    "PRAGMA temp_store = MEMORY",
    f"CREATE VIRTUAL TABLE words USING fts5(text, {_TOKENIZER})",
    "CREATE VIRTUAL TABLE terms USING fts5vocab('words', 'instance')",
)


class NoFullTextSearchError(RuntimeError):
    """This Python's SQLite was built without FTS5."""


def check_available() -> None:
    """Raises NoFullTextSearchError."""
    try:
        LexicalIndex().wipe()
    except sqlite3.OperationalError as error:
        raise NoFullTextSearchError("the sqlite3 module of this Python lacks FTS5") from error


class LexicalIndex:
    """Inverted index of one memory's documents, which come with ascending numbers.

    For one thread at a time. SQLite lets go of the interpreter while it works.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        for statement in _SET_UP:
            self._db.execute(statement)
        self.last_number = 0
        self._numbers = array("q")
        self._lengths = array("q")

    @property
    def bytes(self) -> int:
        """Of the index, spare pages included."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (size,) = self._db.execute("PRAGMA page_size").fetchone()
        lengths = (len(self._numbers) + len(self._lengths)) * self._numbers.itemsize
        return int(pages) * int(size) + lengths

    def add(self, documents: Iterable[tuple[int, str]]) -> None:
        """(number, text) of documents above last_number, ascending."""
        rows = list(documents)
        if rows:
            assert rows[0][0] > self.last_number
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", rows)
            self._db.execute("COMMIT")
            sizes = self._db.execute(
                "SELECT id, sz FROM words_docsize WHERE id > ? ORDER BY id", (self.last_number,)
            )
            for number, size in sizes:
                self._numbers.append(number)
                self._lengths.append(_varint(size))
            self.last_number = rows[-1][0]

    def search(
        self, question: str, limit: int, among: npt.NDArray[np.int64] | None = None
    ) -> dict[int, float]:
        """BM25 by number of the best documents that share a word with the question, best first.

        among: numbers, ascending, of the documents that count: scores are those of an index
        that holds them alone. None: all.
        """
        words = _words(question)
        if not words:
            return {}
        if among is not None:
            return self._search_among(words, limit, among)
        # Word characters alone, quoted: nothing of a question is syntax.
        match = " OR ".join(f'"{word}"' for word in words)
        found = self._db.execute(
            "SELECT rowid, -rank FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?",
            (match, limit),
        )
        return {int(number): float(score) for number, score in found}

    def _search_among(
        self, words: Sequence[str], limit: int, among: npt.NDArray[np.int64]
    ) -> dict[int, float]:
        """FTS5 ranks by how rare a word is in the whole table and knows no other; so its formula
        is applied here, to its own postings and document lengths."""
        numbers_N = np.array(self._numbers, np.int64)
        numbers_n, _, places_n = np.intersect1d(
            among, numbers_N, assume_unique=True, return_indices=True
        )
        lengths_n = np.array(self._lengths, np.float64)[places_n]
        scores_n, shares_n = np.zeros(len(numbers_n)), np.zeros(len(numbers_n), np.bool_)
        for phrase in _phrases(words):
            documents, counts = self._occurrences(phrase)
            _, rows, hits = np.intersect1d(
                numbers_n, documents, assume_unique=True, return_indices=True
            )
            if not len(rows):
                continue
            rarity = math.log((len(numbers_n) - len(rows) + 0.5) / (len(rows) + 0.5))
            often = counts[hits]
            length = 1 - _B + _B * lengths_n[rows] / lengths_n.mean()
            weight = rarity if rarity > 0 else _FREQUENT
            scores_n[rows] += weight * often * (_K1 + 1) / (often + _K1 * length)
            shares_n[rows] = True
        found = np.flatnonzero(shares_n)
        best = found[np.lexsort((found, -scores_n[found]))][:limit]
        return {int(numbers_n[n]): float(scores_n[n]) for n in best}

    def _occurrences(self, phrase: Sequence[str]) -> tuple[npt.NDArray[np.int64], ...]:
        """Documents that hold the terms one after the other, ascending, and how often."""
        one = "SELECT doc, offset FROM terms WHERE term = ?"
        if len(phrase) == 1:
            rows = self._db.execute("SELECT doc FROM terms WHERE term = ?", phrase)
            found = np.fromiter((row[0] for row in rows), np.int64)
        else:
            starts = [
                {(doc, offset - place) for doc, offset in self._db.execute(one, (term,))}
                for place, term in enumerate(phrase)
            ]
            found = np.array([doc for doc, _ in set.intersection(*starts)], np.int64)
        return np.unique(found, return_counts=True)

    def erase(self) -> None:
        """Overwrites all pages with zeros."""
        self._db.execute("DROP TABLE words")
        self._numbers, self._lengths = array("q"), array("q")

    def wipe(self) -> None:
        """Erases, and frees the memory. Nothing else may be called afterwards."""
        self.erase()
        self._db.close()


def _words(question: str) -> list[str]:
    """Distinct, in order."""
    return list(dict.fromkeys(_WORD.findall(question.lower())))[:MAX_WORDS]


def _phrases(words: Sequence[str]) -> list[list[str]]:
    """The terms that each word is indexed as: mostly one, none for a word of underscores."""
    own = sqlite3.connect(":memory:", isolation_level=None)
    try:
        own.execute(f"CREATE VIRTUAL TABLE words USING fts5(text, {_TOKENIZER})")
        own.execute("CREATE VIRTUAL TABLE terms USING fts5vocab('words', 'instance')")
        own.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", enumerate(words))
        phrases: dict[int, list[str]] = {}
        for place, term in own.execute("SELECT doc, term FROM terms ORDER BY doc, offset"):
            phrases.setdefault(place, []).append(term)
        return list(phrases.values())
    finally:
        own.close()


def _varint(data: bytes) -> int:
    """SQLite's: seven bits a byte, the highest first."""
    value = 0
    for byte in data:
        value = value << 7 | byte & 0x7F
    return value
