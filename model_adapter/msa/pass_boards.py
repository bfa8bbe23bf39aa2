"""The boards of all rows of a pass, made together, with what rankings will ask of them.

Rows over memories of about one size are computed beside each other, filled up to a power of two,
so that a row's sums are those of the same shape whoever it shares the pass with.

Shape suffixes: L routed layers, B rows of a block, N documents filled up, K best documents, X
single scores that are brought to the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model_adapter.blending import DEPTH
from model_adapter.msa import kernels
from model_adapter.msa.boards import DeviceBoard, Known, combined
from model_adapter.msa.packed import moved
from model_adapter.msa.routing import INVALID, Positions, Scores

#: Best documents of every row that are brought to the host at once: what a blend with words takes.
AHEAD = max(64, DEPTH)
#: Scores of all layers that are computed with at once.
_BLOCK_SCORES = 1 << 25


@dataclass(frozen=True)
class Ranked:
    """A row: where its scores lie among those of the pass, and of which documents they will be
    looked at beside the best: those that each layer chose, and others."""

    first: int
    documents: int
    chosen: Mapping[int, Positions]
    others: Positions


def boards(
    scores: Mapping[int, torch.Tensor], rows: Sequence[Ranked], *, together: bool
) -> list[DeviceBoard]:
    """In the order of the rows. scores: flat, by model layer. The device is waited for once a
    block of rows, of which there is one but where memories are large or of many sizes."""
    made: list[DeviceBoard | None] = [None] * len(rows)
    for width, places in _blocks(rows, len(scores)):
        block = [rows[place] for place in places]
        for place, board in zip(places, _block(scores, block, width, together), strict=True):
            made[place] = board
    return [board for board in made if board is not None]


def _blocks(rows: Sequence[Ranked], layers: int) -> Iterator[tuple[int, list[int]]]:
    """Width and rows of each."""
    by_width: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_width.setdefault(1 << (row.documents - 1).bit_length(), []).append(place)
    for width, places in by_width.items():
        most = max(_BLOCK_SCORES // (layers * width), 1)
        for first in range(0, len(places), most):
            yield width, places[first : first + most]


def _block(
    scores: Mapping[int, torch.Tensor], rows: Sequence[Ranked], width: int, together: bool
) -> list[DeviceBoard]:
    flats = list(scores.values())
    device = flats[0].device
    spans = torch.from_numpy(np.array([(row.first, row.documents) for row in rows]).T.copy())
    first_B, documents_B = moved(spans, device)
    behind_N = torch.arange(width, device=device)
    index_BN = (first_B[:, None] + behind_N).clamp_max_(len(flats[0]) - 1)
    scores_LBN = torch.stack([flat[index_BN] for flat in flats])
    scores_LBN.masked_fill_(behind_N >= documents_B[:, None], -torch.inf)
    combined_BN = combined(scores_LBN, together=together)
    best = kernels.best(combined_BN, AHEAD)
    single, sizes = _singles(list(scores), rows)
    layer_X, row_X, place_X = moved(torch.from_numpy(single), device)
    over_all = int(sizes[0].sum())
    found = torch.cat(
        (
            best.documents_BK.int().view(torch.float32).flatten(),
            best.scores_BK.flatten(),
            combined_BN[row_X[:over_all], place_X[:over_all]],
            scores_LBN[layer_X[over_all:], row_X[over_all:], place_X[over_all:]],
        )
    ).cpu()
    known = _read(found.numpy(), list(scores), rows, single, sizes)
    return [
        DeviceBoard(scores, row.first, combined_BN, place, told)
        for place, (row, told) in enumerate(zip(rows, known, strict=True))
    ]


def _singles(layers: Sequence[int], rows: Sequence[Ranked]) -> tuple[Positions, Positions]:
    """[3, X]: layer (by its place), row and position of the scores that are looked at, first those
    over all layers (whose layer counts not), then those that layers chose; and how many these are
    of each row, over all layers and in each one [1 + L, B]."""
    parts: list[list[Positions]] = [
        [np.unique(np.concatenate((*row.chosen.values(), row.others))) for row in rows]
    ]
    nothing = np.empty(0, np.int64)
    parts += [[row.chosen.get(layer, nothing) for row in rows] for layer in layers]
    sizes = np.array([[len(places) for places in line] for line in parts])
    lines = np.arange(-1, len(layers)).clip(min=0)
    layer_X = np.repeat(lines, sizes.sum(axis=1))
    row_X = np.repeat(np.tile(np.arange(len(rows)), len(parts)), sizes.ravel())
    place_X = np.concatenate([places for line in parts for places in line])
    return np.stack((layer_X, row_X, place_X)), sizes


def _read(
    found: Scores,
    layers: Sequence[int],
    rows: Sequence[Ranked],
    single: Positions,
    sizes: Positions,
) -> list[Known]:
    """What came from the device: best documents and their scores [B, K], then single scores."""
    count = (len(found) - single.shape[1]) // 2
    best = count // len(rows)
    documents_BK = found[:count].view(np.int32).reshape(-1, best).astype(np.int64)
    scores_BK = found[count : 2 * count].reshape(-1, best)
    cuts = np.cumsum(sizes.ravel())[:-1]
    scores = np.split(found[2 * count :], cuts)
    places = np.split(single[2], cuts)
    known = []
    for row in range(len(rows)):
        valid = scores_BK[row] > INVALID
        best_k = documents_BK[row][valid]
        all_places, kept = np.unique(np.concatenate((best_k, places[row])), return_index=True)
        all_scores = np.concatenate((scores_BK[row][valid], scores[row]))[kept]
        own = [(line + 1) * len(rows) + row for line in range(len(layers))]
        by_layer = {layer: (places[at], scores[at]) for layer, at in zip(layers, own, strict=True)}
        whole = len(best_k) < best or rows[row].documents <= best
        known.append(Known(best_k, whole, all_places, all_scores, by_layer))
    return known
