"""Scores that routing gave to all documents of a memory, wherever they lie.

What ranks documents asks for the best and for the scores of some, so that scores which
were made on a device stay there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class DeviceBoard:
    """Tensors [N] by model layer. together: their mean ranks, else they are standardised."""

    def __init__(self, scores_N: Mapping[int, torch.Tensor], *, together: bool) -> None:
        self._scores_N = dict(scores_N)
        parts = self._scores_N.values()
        parts_LN = torch.stack([part if together else _standardised(part) for part in parts])
        self._combined_N = parts_LN.mean(dim=0)

    def best(self, k: int) -> Positions:
        """See Board."""
        combined_1N = self._combined_N[None]
        found = kernels.best(combined_1N, k)
        valid_K = found.documents_BK[0].masked_fill(found.scores_BK[0] <= INVALID, -1)
        places: Positions = valid_K.cpu().numpy()
        return places[places >= 0]

    def at(self, positions: Sequence[int] | Positions) -> Scores:
        """See Board."""
        found: Scores = self._combined_N[self._index(positions)].cpu().numpy()
        return found

    def layers_at(self, positions: Mapping[int, Positions]) -> dict[int, Scores]:
        """See Board. One transfer for all layers."""
        if not positions:
            return {}
        index = self._index(np.concatenate(list(positions.values())))
        sizes = [len(places) for places in positions.values()]
        parts = zip(positions, torch.split(index, sizes), strict=True)
        found = torch.cat([self._scores_N[layer][places] for layer, places in parts]).cpu().numpy()
        ends = np.cumsum(sizes)[:-1]
        return dict(zip(positions, np.split(found, ends), strict=True))

    def _index(self, positions: Sequence[int] | Positions) -> torch.Tensor:
        return torch.as_tensor(positions, dtype=torch.int64).to(self._combined_N.device)


def _standardised(scores_N: torch.Tensor) -> torch.Tensor:
    """Of valid documents, by their mean and spread; the others are minus infinity."""
    valid_N = scores_N > INVALID
    count = valid_N.sum().clamp_min(1)
    centred_N = torch.where(valid_N, scores_N, 0.0)
    centred_N = torch.where(valid_N, centred_N - centred_N.sum() / count, 0.0)
    spread = (centred_N.square().sum() / count).sqrt()
    unit_N = torch.where(spread > 0, centred_N / spread, 0.0)
    return torch.where(valid_N, unit_N, -torch.inf)
