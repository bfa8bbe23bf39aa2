"""One ranking out of the routed layers' own, and out of the question's words if asked.

Layers that choose for themselves score on scales of their own, so each layer's scores are
standardised over all documents of the memory and then averaged: every layer counts alike.
Layers trained for one combined choice share a scale: the mean of their scores ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model_adapter.blending import DEPTH, blend
from model_adapter.engine import Arrange, LayerScore, LexicalPrior, RankedDocument
from model_adapter.msa.boards import Board, HostBoard
from model_adapter.msa.forward import RowRouting
from model_adapter.msa.routing import Positions, Scores


def combine(routing: RowRouting) -> Scores:
    """fp32 [N]: mean over routed layers of scores, standardised over documents unless the
    layers choose together."""
    if routing.combined_N is not None:
        return routing.combined_N
    total_N: Scores | None = None
    for scores_N in routing.scores_N.values():
        spread = float(scores_N.std())
        part_N = (scores_N - scores_N.mean()) / spread if spread > 0 else np.zeros_like(scores_N)
        total_N = part_N if total_N is None else total_N + part_N
    if total_N is None:
        return np.empty(0, dtype=np.float32)
    return (total_N / len(routing.scores_N)).astype(np.float32)


def rank(
    routing: RowRouting,
    numbers_N: Positions,
    limit: int,
    prior: LexicalPrior | None = None,
    arrange: Arrange | None = None,
) -> tuple[RankedDocument, ...]:
    """The best `limit` documents over all layers, each with the layers that chose it.

    With a prior, by the blend of both; a document may then come from the words alone.
    """
    if arrange is not None:
        return tuple(arrange(lambda most: rank(routing, numbers_N, most, prior), limit))
    board = _board(routing)
    layers = _layer_scores(routing, board)
    best = _scored(board, board.best(limit if prior is None else max(limit, DEPTH)))
    words: dict[int, float] = {}
    order = list(best.items())
    if prior is not None:
        words = by_position(prior, numbers_N)
        order = blend(best, words, prior.weight, limit)
        best |= _scored(board, [n for n, _ in order if n not in best])
    return tuple(
        RankedDocument(
            int(numbers_N[n]),
            score,
            tuple(layers.get(n, ())),
            best[n],
            words.get(n, 0.0),
        )
        for n, score in order
    )


def chosen(routing: RowRouting, numbers_N: Positions) -> tuple[RankedDocument, ...]:
    """All documents that some layer chose, best first by the combined score."""
    board = _board(routing)
    layers = _layer_scores(routing, board)
    scores = _scored(board, list(layers))
    order = sorted(layers, key=lambda n: (-scores[n], n))
    return tuple(
        RankedDocument(int(numbers_N[n]), scores[n], tuple(layers[n]), scores[n]) for n in order
    )


def _board(routing: RowRouting) -> Board:
    return routing.board or HostBoard(combine(routing), routing.scores_N)


def _scored(board: Board, positions: Sequence[int] | Positions) -> dict[int, float]:
    """Scores over all layers, by position."""
    if not len(positions):
        return {}
    places = np.asarray(positions, np.int64)
    return dict(zip(places.tolist(), board.at(places).tolist(), strict=True))


def by_position(prior: LexicalPrior, numbers_N: Positions) -> dict[int, float]:
    """The prior's scores by position in numbers_N; documents that are not there are left out."""
    numbers = np.fromiter(prior.scores, np.int64, len(prior.scores))
    places = np.searchsorted(numbers_N, numbers)
    return {
        int(place): prior.scores[int(number)]
        for place, number in zip(places, numbers, strict=True)
        if place < len(numbers_N) and numbers_N[place] == number
    }


def _layer_scores(routing: RowRouting, board: Board) -> dict[int, list[LayerScore]]:
    found: dict[int, list[LayerScore]] = {}
    scores = board.layers_at(routing.chosen)
    for layer, positions in routing.chosen.items():
        ranked = zip(positions.tolist(), scores[layer].tolist(), strict=True)
        for place, (n, score) in enumerate(ranked, start=1):
            found.setdefault(n, []).append(LayerScore(layer, place, score))
    return found
