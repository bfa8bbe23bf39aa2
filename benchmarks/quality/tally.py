"""Sums over the questions of one row, and the figures made of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from benchmarks.quality import metrics
from benchmarks.quality.answers import Answer
from benchmarks.quality.banks import Question


@dataclass
class Tally:
    """One value per question in each list; a bank's answers may be fewer than its questions."""

    recalls: dict[int, list[float]] = field(
        default_factory=lambda: {k: [] for k in metrics.CUTOFFS}
    )
    rank_seconds: list[float] = field(default_factory=list)
    matches: list[float] = field(default_factory=list)
    f1s: list[float] = field(default_factory=list)
    contained: list[float] = field(default_factory=list)
    declined: list[float] = field(default_factory=list)
    cited: list[float] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    answer_seconds: list[float] = field(default_factory=list)

    def ranked(self, numbers: Sequence[int], gold: Collection[int], seconds: float) -> None:
        """Adds a ranking, best first."""
        for cutoff, values in self.recalls.items():
            values.append(metrics.recall(numbers, gold, cutoff))
        self.rank_seconds.append(seconds)

    def answered(
        self, question: Question, gold: Collection[int], answer: Answer, seconds: float
    ) -> None:
        """Adds an answer to a question that has gold answers."""
        self.matches.append(metrics.exact_match(answer.text, question.answers))
        self.f1s.append(metrics.token_f1(answer.text, question.answers))
        self.contained.append(metrics.contains(answer.text, question.answers))
        self.declined.append(metrics.declines(answer.text))
        self.cited.append(float(bool(set(gold) & set(answer.cited))))
        self.documents.append(len(answer.cited))
        self.answer_seconds.append(seconds)

    def recalls_only(self) -> dict[str, float | None]:
        """Means over the questions."""
        return {f"recall@{k}": metrics.mean(values) for k, values in self.recalls.items()}

    def figures(self) -> dict[str, float | int | None]:
        """Means over the questions; None where nothing was measured."""
        per_question = metrics.mean([seconds * 1000 for seconds in self.rank_seconds])
        return {
            **self.recalls_only(),
            "rank_ms": per_question,
            "answers": len(self.matches),
            "exact_match": metrics.mean(self.matches),
            "f1": metrics.mean(self.f1s),
            "contains": metrics.mean(self.contained),
            "declines": metrics.mean(self.declined),
            "cites_gold": metrics.mean(self.cited),
            "documents_put_in": metrics.mean(self.documents),
            "answer_seconds": metrics.mean(self.answer_seconds),
        }
