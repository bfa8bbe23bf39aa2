"""Memory Parallel: one memory's routing keys over several devices.

Every rank runs the same model on the same questions, and holds the keys of a range of the
memory's documents. A rank scores its own; the best k of each go round, and of those every
rank takes the best k, ties to the lower document: what one rank would choose that held them
all. Ranks make the same calls in the same order.

Shape suffixes are those of this package; n documents of a rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed

from model_adapter.msa.kernels.plan import Offsets


@dataclass(frozen=True)
class Shard:
    """Which documents of a memory this rank holds: ranges[rank] is (first, behind the last)."""

    rank: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, offsets_N1: Offsets, rank: int, ranks: int) -> Shard:
        """Ranges of about as many chunks each. Raises ValueError for fewer documents than ranks."""
        documents = len(offsets_N1) - 1
        if documents < ranks:
            raise ValueError(f"{documents} documents are too few for {ranks} ranks")
        cuts = [0]
        for one in range(1, ranks):
            cut = int(np.searchsorted(offsets_N1, offsets_N1[-1] * one / ranks))
            cuts.append(min(max(cut, cuts[-1] + 1), documents - (ranks - one)))
        return cls(rank, tuple(zip(cuts, [*cuts[1:], documents], strict=True)))

    @property
    def own(self) -> tuple[int, int]:
        """This rank's range."""
        return self.ranges[self.rank]


def merge(keys_BK: torch.Tensor, firsts_B: Sequence[int], lowest: int) -> torch.Tensor:
    """The best of all ranks [B, K], of each rank's best by its own positions.

    keys_BK: as `twin.order_keys` has them. firsts_B: position of the rank's first document in
    each question's memory. lowest: a key that stands for no document.
    """
    firsts_B1 = torch.tensor(firsts_B)[:, None].to(keys_BK.device)
    # A later position is a smaller key.
    moved_BK = torch.where(keys_BK == lowest, keys_BK, keys_BK - firsts_B1)
    everyones = [torch.empty_like(moved_BK) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyones, moved_BK)
    return torch.cat(everyones, dim=1).topk(keys_BK.shape[1], dim=1).values


def gather_scores(scores_Ln: torch.Tensor, shard: Shard) -> torch.Tensor:
    """[L, N] of all ranks' documents, in order."""
    sizes = [stop - first for first, stop in shard.ranges]
    padded = scores_Ln.new_zeros(scores_Ln.shape[0], max(sizes))
    padded[:, : scores_Ln.shape[1]] = scores_Ln
    everyones = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(everyones, padded)
    return torch.cat([part[:, :size] for part, size in zip(everyones, sizes, strict=True)], dim=1)


def gather_rows(rows_cX: torch.Tensor, places: torch.Tensor, total: int) -> torch.Tensor:
    """[total, X] of rows of which each rank has some, bit for bit. places: where its own go.

    A row's bytes are a multiple of 4: bits are added to zeros as integers.
    """
    bits = rows_cX.contiguous().view(torch.int32)
    everyones = bits.new_zeros(total, bits.shape[1])
    everyones[places] = bits
    distributed.all_reduce(everyones)
    return everyones.view(rows_cX.dtype)
