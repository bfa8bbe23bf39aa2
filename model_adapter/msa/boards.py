"""Scores that routing gave to all documents of a memory, wherever they lie.

What ranks documents asks for the best and for the scores of some, so that scores which
were made on a device stay there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from model_adapter.msa import kernels
from model_adapter.msa.routing import INVALID, Positions, Scores, select


class Board(Protocol):
    """Scores of one routing, in every layer and over all of them."""

    def best(self, k: int) -> Positions:
        """The k best valid documents over all layers, best first; ties to the lower position."""

    def at(self, positions: Sequence[int] | Positions) -> Scores:
        """Scores over all layers."""

    def layers_at(self, positions: Mapping[int, Positions]) -> dict[int, Scores]:
        """Scores in single layers. positions: by model layer."""


class HostBoard:
    """Arrays in RAM. combined_N: over all layers."""

    def __init__(self, combined_N: Scores, scores_N: Mapping[int, Scores]) -> None:
        self._combined_N, self._scores_N = combined_N, scores_N

    def best(self, k: int) -> Positions:
        """See Board."""
        return select(self._combined_N, k)

    def at(self, positions: Sequence[int] | Positions) -> Scores:
        """See Board."""
        return self._combined_N[np.asarray(positions, dtype=np.int64)]

    def layers_at(self, positions: Mapping[int, Positions]) -> dict[int, Scores]:
        """See Board."""
        return {layer: self._scores_N[layer][places] for layer, places in positions.items()}


@dataclass(frozen=True)
class Known:
    """What of a board is on the host. best_K: the best over all layers; whole: there are no more
    that are valid. places, scores: over all layers, by ascending position. by_layer: of the
    positions that each layer chose, in that order."""

    best_K: Positions
    whole: bool
    places: Positions
    scores: Scores
    by_layer: Mapping[int, tuple[Positions, Scores]]


class DeviceBoard:
    """A row's scores, which lie on the device among those of the other rows of its pass.

    What is `known` is answered from there, the rest from the device, which is waited for.
    """

    def __init__(
        self,
        scores: Mapping[int, torch.Tensor],
        first: int,
        combined_BN: torch.Tensor,
        place: int,
        known: Known | None = None,
    ) -> None:
        """scores: flat, by model layer; the row's begin at `first`. combined_BN: over all layers,
        minus infinity behind the last document; the row is the one at `place`."""
        self._scores, self._first, self._known = scores, first, known
        self._combined_BN, self._place = combined_BN, place

    def best(self, k: int) -> Positions:
        """See Board."""
        known = self._known
        if known is not None and (k <= len(known.best_K) or known.whole):
            return known.best_K[:k]
        found = kernels.best(self._combined_BN[self._place][None], k)
        valid_K = found.documents_BK[0].masked_fill(found.scores_BK[0] <= INVALID, -1)
        places: Positions = valid_K.cpu().numpy()
        return places[places >= 0]

    def at(self, positions: Sequence[int] | Positions) -> Scores:
        """See Board."""
        wanted = np.asarray(positions, dtype=np.int64)
        if self._known is not None and len(self._known.places):
            places = self._known.places
            found_at = np.searchsorted(places, wanted).clip(max=len(places) - 1)
            if (places[found_at] == wanted).all():
                told: Scores = self._known.scores[found_at]
                return told
        combined_N = self._combined_BN[self._place]
        found: Scores = combined_N[torch.from_numpy(wanted).to(combined_N.device)].cpu().numpy()
        return found

    def layers_at(self, positions: Mapping[int, Positions]) -> dict[int, Scores]:
        """See Board. One transfer for all layers."""
        if not positions:
            return {}
        if self._known is not None:
            told = self._known.by_layer
            if all(np.array_equal(told[layer][0], wanted) for layer, wanted in positions.items()):
                return {layer: told[layer][1] for layer in positions}
        places = torch.from_numpy(np.concatenate(list(positions.values())) + self._first)
        index = places.to(next(iter(self._scores.values())).device)
        sizes = [len(places) for places in positions.values()]
        parts = zip(positions, torch.split(index, sizes), strict=True)
        found = torch.cat([self._scores[layer][places] for layer, places in parts]).cpu().numpy()
        ends = np.cumsum(sizes)[:-1]
        return dict(zip(positions, np.split(found, ends), strict=True))


def combined(scores_LBN: torch.Tensor, *, together: bool) -> torch.Tensor:
    """[B, N]: the mean over layers, whose scores are standardised unless they choose `together`.
    Documents that do not count, and what fills up a row, are at most INVALID in all layers."""
    return (scores_LBN if together else _standardised(scores_LBN)).mean(dim=0)


def _standardised(scores_LBN: torch.Tensor) -> torch.Tensor:
    """Of valid documents, by their mean and spread; the others are minus infinity."""
    valid_LBN = scores_LBN > INVALID
    count_LB1 = valid_LBN.sum(dim=-1, keepdim=True).clamp_min(1)
    centred_LBN = torch.where(valid_LBN, scores_LBN, 0.0)
    mean_LB1 = centred_LBN.sum(dim=-1, keepdim=True) / count_LB1
    centred_LBN = torch.where(valid_LBN, centred_LBN - mean_LB1, 0.0)
    spread_LB1 = (centred_LBN.square().sum(dim=-1, keepdim=True) / count_LB1).sqrt()
    unit_LBN = torch.where(spread_LB1 > 0, centred_LBN / spread_LB1, 0.0)
    return torch.where(valid_LBN, unit_LBN, -torch.inf)
