"""Later statements before the earlier ones that they may supersede.

Who moves twice says twice where they live, and both statements answer "where?". Among the
best documents of a ranking, one gives its place to the latest of those after it that say
about the same: whose words are alike. Nothing is left out, and what is unlike keeps its order.

Measured, with what it does not do, in docs/time.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from model_adapter.engine import RankedDocument
from storage.documents import render
from storage.filters import attributes
from storage.store import StoredDocument

#: Documents whose words say how rare a word is.
POOL = 50
#: Documents from the best on that may change places.
CONSIDERED = 10
#: Least cosine of two documents' words, each counted once, by how rare it is in the pool.
ALIKE = 0.25

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_WORD = re.compile(r"\w+")

Ranked: TypeAlias = Sequence[RankedDocument]


@dataclass(frozen=True)
class Statement:
    """A document's words, and when it was said, in microseconds since 1970 UTC."""

    text: str
    said_us: int


#: Statements of documents, by number; a document that is gone is missing.
Statements = Callable[[Sequence[int]], Mapping[int, Statement]]


def statement_of(document: StoredDocument) -> Statement:
    """Said when its last turn was; where that is not known, when it was added."""
    moments = [turn.occurred_at for turn in attributes(document.source)]
    known = [moment for moment in moments if moment is not None]
    said_us = (max(known) - _EPOCH) // _MICROSECOND if known else document.created_at_us
    return Statement(render(document.source), said_us)


@dataclass(frozen=True)
class LatestFirst:
    """Rearranges rankings of one memory."""

    statements: Statements

    def __call__(self, rank: Callable[[int], Ranked], limit: int) -> list[RankedDocument]:
        """The best `limit` of what `rank` finds for a limit of its own."""
        ranked = rank(max(limit, POOL))
        told = self.statements([document.number for document in ranked[:POOL]])
        alike = _similarity({number: told[number].text for number in told})
        waiting = list(ranked[:CONSIDERED])
        arranged: list[RankedDocument] = []
        while waiting:
            best, own = waiting[0], told.get(waiting[0].number)
            chosen, latest = best, own
            for other in waiting[1:]:
                its = told.get(other.number)
                if own is None or its is None or latest is None:
                    continue
                is_later = (its.said_us, other.number) > (latest.said_us, chosen.number)
                if is_later and alike(best.number, other.number) >= ALIKE:
                    chosen, latest = other, its
            waiting.remove(chosen)
            arranged.append(chosen)
        return [*arranged, *ranked[CONSIDERED:]][:limit]


def _similarity(texts: Mapping[int, str]) -> Callable[[int, int], float]:
    words = {number: set(_WORD.findall(text.lower())) for number, text in texts.items()}
    held = Counter(word for own in words.values() for word in own)
    weight = {word: math.log((len(texts) + 1) / count) ** 2 for word, count in held.items()}
    length = {n: math.sqrt(sum(weight[word] for word in own)) for n, own in words.items()}

    def cosine(one: int, other: int) -> float:
        shared = sum(weight[word] for word in words[one] & words[other])
        return shared / (length[one] * length[other] or 1.0)

    return cosine
