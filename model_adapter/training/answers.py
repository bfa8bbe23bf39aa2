"""Rows for the answer loss: routed text as it is served, and short answers."""

from __future__ import annotations

import numpy as np

from model_adapter.msa.prompt import PromptBuilder
from model_adapter.training.corpus import Corpus
from model_adapter.training.data import Query
from model_adapter.training.sampler import AnswerRow
from model_adapter.training.settings import Settings

REFUSAL = "I don't know."
MAX_ANSWER_TOKENS = 48
MAX_DISTRACTORS = 5
#: Tokens of a row beside its documents, question and answer; and of a document beside its text.
FRAME_TOKENS = 64
CITED_TOKENS = 8


class AnswerRows:
    """Chat turns with gold documents and distractors in any order, by step."""

    def __init__(self, corpus: Corpus, settings: Settings, prompts: PromptBuilder) -> None:
        self._corpus, self._settings, self._prompts = corpus, settings, prompts
        self._pools: list[tuple[list[int], float]] = []
        for place, source in enumerate(corpus.sources):
            asked = corpus.pools.get((place, False), [])
            if pool := [n for n in asked if corpus.queries[n].answers and source.answers > 0]:
                self._pools.append((pool, source.answers))
        weights = np.array([weight for _, weight in self._pools])
        self._shares = weights / weights.sum() if self._pools else weights

    def draw(self, step: int) -> list[AnswerRow]:
        """Rows of at most answer_tokens tokens together; none without sources of answers."""
        rng = np.random.default_rng([self._settings.seed, step, 2])
        rows: list[AnswerRow] = []
        used = refused = 0
        while self._pools and refused < 4:
            pool = self._pools[int(rng.choice(len(self._pools), p=self._shares))][0]
            row = self._row(self._corpus.queries[pool[int(rng.integers(len(pool)))]], rng)
            if row is None or used + len(row.ids) > self._settings.answer_tokens:
                refused += 1
                continue
            rows.append(row)
            used += len(row.ids)
        return rows

    def _row(self, query: Query, rng: np.random.Generator) -> AnswerRow | None:
        prompts, corpus = self._prompts, self._corpus
        target = [*prompts.text(query.answers[0]), *prompts.template.turn_end]
        if len(target) > MAX_ANSWER_TOKENS:
            return None
        distractors = self._distractors(query, rng)
        refuses = bool(distractors) and rng.random() < self._settings.refusals
        if refuses:
            target = [*prompts.text(REFUSAL), *prompts.template.turn_end]
        shown = distractors if refuses else [*query.gold, *distractors]
        # Under numbers that say nothing of which of them answers, as a memory's do.
        ordered = [shown[int(n)] for n in rng.permutation(len(shown))]
        cited = [prompts.cited(corpus.numbers[n], corpus.documents[n].text) for n in ordered]
        ids = [*prompts.chat(cited, query.text), *target]
        if len(ids) > self._settings.max_answer_row:
            return None
        return AnswerRow(tuple(ids), len(target))

    def _distractors(self, query: Query, rng: np.random.Generator) -> list[int]:
        """Neighbours of the gold document in any order, as far as a row has room for them."""
        corpus = self._corpus
        near = corpus.neighbours_NX[query.gold[0]]
        near = [int(n) for n in near if n >= 0 and int(n) not in query.gold]
        room = self._settings.max_answer_row - FRAME_TOKENS - len(query.ids) - MAX_ANSWER_TOKENS
        room -= sum(len(corpus.tokens[n]) + CITED_TOKENS for n in query.gold)
        wanted, found = int(rng.integers(MAX_DISTRACTORS + 1)), list[int]()
        for place in rng.permutation(len(near)):
            size = len(corpus.tokens[near[int(place)]]) + CITED_TOKENS
            if len(found) < wanted and size <= room:
                found.append(near[int(place)])
                room -= size
        return found
