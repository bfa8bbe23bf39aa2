"""What one golden file was compared on, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch

#: Scores at or below this are "no score"; how they are written does not matter.
NO_SCORE = -1e9
_MAX_MISMATCHES = 8


class Kind(StrEnum):
    """What a tensor is; tolerances are per kind."""

    LOGITS = "logits"
    SCORES = "scores"
    MEMORY = "memory"
    HIDDEN = "hidden"


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted absolute differences. near_tie: two documents whose golden scores
    are closer than this may stand in another order (0: never)."""

    logits: float
    scores: float
    memory: float
    hidden: float
    near_tie: float = 0.0


#: fp32 against vectors whose pooling was exact.
EXACT = Tolerance(logits=2e-5, scores=2e-5, memory=2e-5, hidden=5e-5)
#: fp32 against vectors pooled with running sums, which are off by up to 1.3e-4 themselves.
RUNNING_SUM = Tolerance(logits=1e-4, scores=3e-4, memory=3e-4, hidden=5e-4, near_tie=3e-4)
#: bf16, with tokens and selection given: two runs of it differ as much from each other.
BF16 = Tolerance(logits=0.25, scores=0.1, memory=0.125, hidden=0.5, near_tie=0.1)


@dataclass
class Comparison:
    """Collects differences of one file."""

    tolerance: Tolerance
    worst: dict[str, float] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    compared: int = 0
    near_ties: int = 0
    notes: list[str] = field(default_factory=list)

    def tensor(self, kind: Kind, name: str, ours: torch.Tensor, golden: torch.Tensor) -> None:
        """Largest absolute difference, against the kind's tolerance."""
        self.compared += 1
        if ours.shape != golden.shape:
            self.mismatch(f"{name}: shape {tuple(ours.shape)}, golden {tuple(golden.shape)}")
            return
        if not ours.numel():
            return
        ours, golden = ours.cpu().double(), golden.double()
        if kind is Kind.SCORES:
            ours, golden = ours.clamp_min(NO_SCORE), golden.clamp_min(NO_SCORE)
        difference = float((ours - golden).abs().max())
        self.worst[kind] = max(self.worst.get(kind, 0.0), difference)
        limit = getattr(self.tolerance, kind.value)
        if not difference <= limit:
            self.mismatch(f"{name}: differs by {difference:.3g}, tolerance {limit:g}")

    def equal(self, name: str, ours: object, golden: object) -> None:
        """Equality of ids, texts and shapes."""
        self.compared += 1
        if ours != golden:
            self.mismatch(f"{name}: {_short(ours)}, golden {_short(golden)}")

    def ranking(
        self, name: str, ours: Sequence[int], golden: Sequence[int], scores_N: np.ndarray
    ) -> bool:
        """Same documents in the same order, or only near ties apart. True for same sets.

        scores_N: the golden scores of all documents, or ours where there are none.
        """
        self.compared += 1
        if list(ours) == list(golden):
            return True
        tie = self.tolerance.near_tie
        close = len(ours) == len(golden) and all(
            abs(float(scores_N[a]) - float(scores_N[b])) <= tie
            for a, b in zip(ours, golden, strict=True)
        )
        if tie and close:
            self.near_ties += 1
        else:
            self.mismatch(f"{name}: documents {list(ours)}, golden {list(golden)}")
        return sorted(ours) == sorted(golden)

    def mismatch(self, text: str) -> None:
        """Notes a failure."""
        self.mismatches.append(text)

    def report(self) -> dict[str, object]:
        """As it is printed."""
        result: dict[str, object] = {
            "pass": not self.mismatches and self.compared > 0,
            "max_difference": max(self.worst.values(), default=0.0),
            "by_kind": dict(self.worst),
            "compared": self.compared,
        }
        if self.near_ties:
            result["near_ties"] = self.near_ties
        if self.notes:
            result["notes"] = self.notes
        if self.mismatches:
            result["mismatches"] = self.mismatches[:_MAX_MISMATCHES]
            result["mismatch_count"] = len(self.mismatches)
        return result


def decided(logits_V: torch.Tensor, tolerance: float) -> bool:
    """The best token leads by more than two runs within tolerance could differ."""
    first, second = logits_V.float().topk(2).values.tolist()
    return bool(first - second > 2 * tolerance)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
