"""Which documents and queries make a step: a function of the seed and the step alone.

Hard negatives cost nothing extra: a draw brings companions, questions whose documents are
among the teacher's nearest neighbours of its own, and every document of a batch is a
negative of every question that it does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model_adapter.training.corpus import Corpus
from model_adapter.training.settings import Settings

MAX_GOLD = 4


@dataclass
class Drawn:
    """Places in Corpus.documents and Corpus.queries; every gold document is there."""

    documents: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class AnswerRow:
    """A chat turn with documents' text, and the answer that is learned: `targets` last tokens."""

    ids: tuple[int, ...]
    targets: int


class Sampler:
    """Draws steps from a corpus."""

    def __init__(self, corpus: Corpus, settings: Settings, head_tokens: int) -> None:
        self._corpus, self._settings = corpus, settings
        self._head = head_tokens
        self._pools = [
            (pool, weight)
            for place, source in enumerate(corpus.sources)
            for made_up, weight in ((False, source.weight), (True, source.pseudo_weight))
            if (pool := corpus.pools.get((place, made_up))) and weight > 0
        ]
        weights = np.array([weight for _, weight in self._pools])
        self._shares = weights / weights.sum()

    def draw(self, step: int) -> Drawn:
        """The documents and queries of a step, within its tokens."""
        rng = np.random.default_rng([self._settings.seed, step, 1])
        filling = _Filling(self._corpus, self._settings, self._head)
        refused = 0
        while refused < 3 and not filling.full:
            pool = self._pools[int(rng.choice(len(self._pools), p=self._shares))][0]
            query = pool[int(rng.integers(len(pool)))]
            if not filling.add(query):
                refused += 1
                continue
            for companion in self._companions(query, rng):
                filling.add(companion)
        for document in list(filling.drawn.documents):
            extra = list(rng.permutation(self._corpus.asked_N[document]))
            for query in extra[: self._settings.queries_per_document - 1]:
                filling.add(int(query), only_present=True)
        return filling.drawn

    def _companions(self, query: int, rng: np.random.Generator) -> list[int]:
        """Queries about neighbours of the query's document, of its own kind where there is one."""
        corpus = self._corpus
        document = corpus.queries[query].gold[0]
        near = corpus.neighbours_NX[document]
        near = rng.permutation(near[near >= 0])
        found: list[int] = []
        for neighbour in near:
            asked = corpus.asked_N[int(neighbour)]
            alike = [n for n in asked if corpus.queries[n].made_up == corpus.queries[query].made_up]
            if choices := alike or asked:
                found.append(choices[int(rng.integers(len(choices)))])
            if len(found) == self._settings.companions:
                break
        return found


class _Filling:
    """A step that is being filled."""

    def __init__(self, corpus: Corpus, settings: Settings, head: int) -> None:
        self.drawn = Drawn()
        self._corpus, self._settings, self._head = corpus, settings, head
        self._documents: set[int] = set()
        self._queries: set[int] = set()
        self._document_tokens = self._query_tokens = 0

    @property
    def full(self) -> bool:
        """No average document or query would fit any more."""
        return (
            self._document_tokens > self._settings.document_tokens * 0.97
            or self._query_tokens > self._settings.query_tokens * 0.97
        )

    def add(self, place: int, *, only_present: bool = False) -> bool:
        """Takes a query with its documents, if all of it fits and it is new."""
        query = self._corpus.queries[place]
        new = [n for n in query.gold if n not in self._documents]
        tokens = sum(len(self._corpus.tokens[n]) for n in new)
        asked = self._head + len(query.ids)
        if (
            place in self._queries
            or len(query.gold) > MAX_GOLD
            or (only_present and new)
            or self._document_tokens + tokens > self._settings.document_tokens
            or self._query_tokens + asked > self._settings.query_tokens
        ):
            return False
        self._queries.add(place)
        self._documents.update(new)
        self.drawn.queries.append(place)
        self.drawn.documents += new
        self._document_tokens += tokens
        self._query_tokens += asked
        return True


def pad_to(lengths: Sequence[int], total: int, longest: int) -> list[int]:
    """Lengths of filler sequences that bring a stream to exactly `total` tokens."""
    left = total - sum(lengths)
    return [longest] * (left // longest) + ([left % longest] if left % longest else [])
