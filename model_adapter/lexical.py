"""Words of a memory: a full-text index that a question is ranked by, beside routing.

SQLite's FTS5, in this process's memory and nowhere else: BM25 over stemmed words, and
documents are added as they come. It holds an inverted index, not the texts.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable

_WORD = re.compile(r"\w+")
#: Distinct words of a question that are looked for; the rest of a very long one is not.
MAX_WORDS = 128

_SET_UP = (
    # Nothing is rolled back, and what is dropped is overwritten with zeros.
    "PRAGMA journal_mode = OFF",
    "PRAGMA secure_delete = ON",
    # A sort that grows must not go to a file.
    "PRAGMA temp_store = MEMORY",
    "CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='porter unicode61')",
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

    @property
    def bytes(self) -> int:
        """Of the index, spare pages included."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (size,) = self._db.execute("PRAGMA page_size").fetchone()
        return int(pages) * int(size)

    def add(self, documents: Iterable[tuple[int, str]]) -> None:
        """(number, text) of documents above last_number, ascending."""
        rows = list(documents)
        if rows:
            assert rows[0][0] > self.last_number
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", rows)
            self._db.execute("COMMIT")
            self.last_number = rows[-1][0]

    def search(self, question: str, last_number: int, limit: int) -> dict[int, float]:
        """BM25 by number of the best documents that share a word with the question, best first.

        Documents above last_number are not found, but count as texts that hold a word.
        """
        words = list(dict.fromkeys(_WORD.findall(question.lower())))[:MAX_WORDS]
        if not words:
            return {}
        # Word characters alone, quoted: nothing of a question is syntax.
        match = " OR ".join(f'"{word}"' for word in words)
        found = self._db.execute(
            "SELECT rowid, -rank FROM words WHERE words MATCH ? AND rowid <= ?"
            " ORDER BY rank, rowid LIMIT ?",
            (match, last_number, limit),
        )
        return {int(number): float(score) for number, score in found}

    def erase(self) -> None:
        """Overwrites all pages with zeros."""
        self._db.execute("DROP TABLE words")

    def wipe(self) -> None:
        """Erases, and frees the memory. Nothing else may be called afterwards."""
        self.erase()
        self._db.close()
