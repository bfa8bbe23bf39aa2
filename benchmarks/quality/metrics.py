"""Recall of documents; exact match and token F1 of answers as SQuAD defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

CUTOFFS = (1, 5, 10)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DECLINES = ("dont know", "do not know", "no information", "not mentioned")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD v1.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 when the answer is one of the gold answers, else 0."""
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of words over the gold answers."""
    return max(_f1(normalise(answer).split(), normalise(gold).split()) for gold in golds)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    shared = sum((Counter(answer) & Counter(gold)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def contains(answer: str, golds: Sequence[str]) -> float:
    """1 when some gold answer stands in the answer, word for word."""
    padded = f" {normalise(answer)} "
    return float(any(f" {normalise(gold)} " in padded for gold in golds if normalise(gold)))


def declines(answer: str) -> float:
    """1 when the answer says that it knows none."""
    said = normalise(answer.replace("\u2019", "'"))
    return float(any(phrase in said for phrase in _DECLINES))


def recall(ranked: Sequence[int], gold: Collection[int], cutoff: int) -> float:
    """Share of the gold documents among the first `cutoff`."""
    return len(set(ranked[:cutoff]) & set(gold)) / len(gold)


def mean(values: Sequence[float]) -> float | None:
    """Rounded to four places; None of nothing."""
    return round(sum(values) / len(values), 4) if values else None
