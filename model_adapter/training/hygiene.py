"""What must not be trained on: texts of evaluation banks, and sets that may not be shipped.

A question is dropped when an evaluation set asks the same one; a document when its first
80 characters occur in a document of an evaluation set. Both are compared without case,
punctuation and repeated blanks. A question all of whose documents are gone goes with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_adapter.training.data import Question, QuestionSet, read_rows
from model_adapter.training.errors import SettingsError

PREFIX = 80
#: Licences under which trained weights may be shipped, with attribution.
SHIPPABLE = frozenset(
    {"CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "MIT", "Apache-2.0", "CC0-1.0"}
)

#: Words by which a text is looked for; the last one may be cut by the 80 characters.
_FIRST_WORDS = 3
_NOT_WORDS = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Dropped:
    """How much of a set was left out."""

    questions: int
    documents: int


def normalised(text: str) -> str:
    """Lower case words with single blanks between."""
    return _NOT_WORDS.sub(" ", text.lower()).strip()


class Evaluation:
    """Questions and document texts of all evaluation sets."""

    def __init__(self, questions: Iterable[str], documents: Iterable[str]) -> None:
        self._questions = {normalised(question) for question in questions}
        self._documents = [normalised(document) for document in documents]

    @classmethod
    def read(cls, files: Iterable[Path]) -> Evaluation:
        """From corpus and questions files of any number of sets. Raises DataError."""
        questions: list[str] = []
        documents: list[str] = []
        for file in files:
            for _, row in read_rows(file):
                for key, texts in (("question", questions), ("text", documents)):
                    if isinstance(row.get(key), str):
                        texts.append(row[key])
        return cls(questions, documents)

    def asks(self, question: str) -> bool:
        """Whether an evaluation set asks this."""
        return normalised(question) in self._questions

    def held(self, texts: Iterable[str]) -> set[str]:
        """Those of the texts whose first 80 characters occur in an evaluation document.

        A text shorter than half of that counts only as a whole document. Every document is
        read once, whatever the number of texts: by its first words a text is looked for at
        each word.
        """
        found: set[str] = set()
        whole: dict[str, list[str]] = {}
        by_words: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        for text in texts:
            start = normalised(text)[:PREFIX].strip()
            words = tuple(start.split()[:_FIRST_WORDS])
            if len(start) < PREFIX // 2 or len(words) < _FIRST_WORDS:
                whole.setdefault(start, []).append(text)
            else:
                by_words.setdefault(words, []).append((start, text))
        for document in self._documents:
            found.update(whole.get(document, ()))
            words_of = document.split()
            for place, first in enumerate(zip(*(words_of[n:] for n in range(_FIRST_WORDS)))):  # noqa: B905 - the tails differ in length
                for start, text in by_words.get(first, ()):
                    if " ".join(words_of[place : place + PREFIX]).startswith(start):
                        found.add(text)
        return found


def check_licence(name: str, licence: str) -> None:
    """Raises SettingsError unless weights trained on a set of this licence may be shipped."""
    if licence not in SHIPPABLE:
        allowed = ", ".join(sorted(SHIPPABLE))
        raise SettingsError(f"{name}: weights under {licence!r} may not be shipped; only {allowed}")


def clean(sets: Sequence[QuestionSet], evaluation: Evaluation) -> list[tuple[QuestionSet, Dropped]]:
    """The sets without what evaluation sets hold, and how much that was."""
    bodies = (document.body for dirty in sets for document in dirty.documents.values())
    held = evaluation.held(bodies)
    return [_clean(dirty, evaluation, held) for dirty in sets]


def _clean(
    dirty: QuestionSet, evaluation: Evaluation, held: set[str]
) -> tuple[QuestionSet, Dropped]:
    documents = {id_: doc for id_, doc in dirty.documents.items() if doc.body not in held}
    questions: list[Question] = []
    for question in dirty.questions:
        gold = tuple(id_ for id_ in question.gold if id_ in documents)
        if gold and len(gold) == len(question.gold) and not evaluation.asks(question.text):
            questions.append(question)
    kept = QuestionSet(dirty.name, documents, questions)
    dropped = Dropped(len(dirty.questions) - len(questions), len(dirty.documents) - len(documents))
    return kept, dropped
