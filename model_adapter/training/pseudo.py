"""Questions made from a passage: they teach routing words and names without anyone's labels.

Four ways (an inverse cloze task, Lee et al. 2019, and simpler ones): a crop of a sentence, a
sentence with a name or number asked for, the title in a template, a few rare words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from model_adapter.training.data import Document

CROP_WORDS = (5, 16)
RARE_WORDS = (2, 6)
LOWER_CASE = 0.4

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w[\w'-]*")
_NAME = re.compile(r"(?<=[a-z,;] )(?:[A-Z][\w'-]+(?: (?:of |the |de |van )?[A-Z][\w'-]+)*)")
_NUMBER = re.compile(r"\b\d[\d,.]*\b")
_TITLE_TEMPLATES = (
    "who is {title}?",
    "what is {title}?",
    "tell me about {title}",
    "what do we know about {title}'s {word}?",
    "{title} {word}",
    "what did {title} have to do with {word}?",
    "when did {title} {word}?",
)


class PseudoQuestions:
    """Makes questions of passages; knows how common each word is in the corpus."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._counts: Mapping[str, int] = Counter(
            word for document in documents for word in set(words_of(document.body))
        )

    def make(self, document: Document, rng: np.random.Generator) -> str:
        """One question, or "" when the passage gives none."""
        draw = rng.random()
        sentences = [part for part in _SENTENCE.split(document.body) if len(part.split()) >= 4]
        question = ""
        if draw < 0.3 and sentences:
            question = self._crop(sentences, rng)
        elif draw < 0.6 and sentences:
            question = _cloze(sentences, rng)
        elif draw < 0.75 and document.title:
            template = _TITLE_TEMPLATES[int(rng.integers(len(_TITLE_TEMPLATES)))]
            rare = self._rare(document, rng, 1)
            question = template.format(title=document.title, word=rare)
        question = question or self._rare(document, rng, int(rng.integers(*RARE_WORDS)))
        return question.lower() if rng.random() < LOWER_CASE else question

    def _crop(self, sentences: Sequence[str], rng: np.random.Generator) -> str:
        words = sentences[int(rng.integers(len(sentences)))].split()
        size = min(int(rng.integers(*CROP_WORDS)), len(words))
        first = int(rng.integers(len(words) - size + 1))
        return " ".join(words[first : first + size])

    def _rare(self, document: Document, rng: np.random.Generator, count: int) -> str:
        words = [word for word in dict.fromkeys(words_of(document.body)) if len(word) > 2]
        rarest = sorted(words, key=lambda word: (self._counts.get(word, 0), word))
        pool = rarest[: 2 * count + 2]
        if not pool:
            return ""
        chosen = rng.permutation(len(pool))[:count]
        return " ".join(pool[place] for place in chosen)


def words_of(text: str) -> list[str]:
    """Lower-case words."""
    return [word.lower() for word in _WORD.findall(text)]


def _cloze(sentences: Sequence[str], rng: np.random.Generator) -> str:
    """A sentence in which a name or a number became a question word."""
    sentence = sentences[int(rng.integers(len(sentences)))].rstrip(".!? ")
    spans = [(match, "who") for match in _NAME.finditer(sentence)]
    for match in _NUMBER.finditer(sentence):
        year = re.fullmatch(r"1\d{3}|20\d\d", match[0])
        spans.append((match, "which year" if year else "how many"))
    if not spans:
        return ""
    match, asked = spans[int(rng.integers(len(spans)))]
    if asked == "who":
        asked = ("who", "what", "which")[int(rng.integers(3))]
    return f"{sentence[: match.start()]}{asked}{sentence[match.end() :]}?"
