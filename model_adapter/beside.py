"""What a question asks of its memory before the engine sees it: a mask, and its words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from model_adapter.engine import Arrange, LexicalPrior
from model_adapter.lease import Lease
from model_adapter.masking import MaskedView
from model_adapter.removals import Removals
from model_adapter.superseding import LatestFirst
from storage.filters import DocumentFilter

#: The lease, and what of it the engine is to see.
Leased: TypeAlias = tuple[Lease, Lease | MaskedView]


@dataclass
class Beside:
    """What is asked of a memory beside routing. Seconds: that it took, indexing included.

    limit: documents by words. weight: share of the words. wanted: None for all documents.
    latest: later statements come before those that they may supersede. removed: documents that
    are there no more, whatever the store holds.
    """

    question: str
    limit: int
    weight: float
    wanted: DocumentFilter | None
    latest: bool = False
    removed: Removals | None = None
    words_s: float = 0.0
    filter_s: float = 0.0

    def view(self, lease: Lease, unwanted: Callable[[], bool]) -> Lease | MaskedView:
        """The memory without what is deleted, as the filter leaves it."""
        if self.wanted is None and self.removed is None:
            return lease
        keep_N = np.ones(len(lease.numbers_N), np.bool_)
        if self.removed is not None:
            keep_N &= self.removed.spare(lease.numbers_N)
        if self.wanted is not None:
            began = time.monotonic()
            keep_N &= lease.matching(self.wanted, unwanted)
            self.filter_s = time.monotonic() - began
        return MaskedView(lease, keep_N)

    def prior(
        self, lease: Lease, view: Lease | MaskedView, unwanted: Callable[[], bool]
    ) -> LexicalPrior | None:
        """What the words say of the documents in view; None when they have no share."""
        if not self.weight:
            return None
        began = time.monotonic()
        among = None if view is lease else view.numbers_N
        scores = lease.words(self.question, self.limit, unwanted, among)
        self.words_s = time.monotonic() - began
        return None if scores is None else LexicalPrior(self.weight, scores)

    def arrange(self, lease: Lease) -> Arrange | None:
        """The order in which documents come, other than by rank."""
        return LatestFirst(lease.statements) if self.latest else None
