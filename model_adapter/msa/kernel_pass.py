"""Routing of all rows of one pass together, over keys that lie on the device.

One launch scores a layer for every row and memory, and one more chooses. Nothing waits
for the device but what must: a layer that chooses for itself tells the host which
documents' content to bring; layers that choose together say so once, behind the last.

Shape suffixes are those of kernels; B rows that route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model_adapter.msa import kernels
from model_adapter.msa.boards import DeviceBoard
from model_adapter.msa.config import ChunkReduce, HeadReduce, MsaConfig, QueryReduce
from model_adapter.msa.kernels import Batch, KeyStorage, Plan, ResidentKeys, Rows, Spans
from model_adapter.msa.kernels.launches import LOWEST
from model_adapter.msa.kernels.rows import padded_tokens
from model_adapter.msa.kernels.sharding import gather_scores, merge
from model_adapter.msa.packed import moved
from model_adapter.msa.pass_boards import Ranked, boards
from model_adapter.msa.routing import INVALID, Positions, mean_heads, scaled_query

#: Documents of each row whose exact scores replace the coarse ones, at least, and for each
#: that is chosen.
_SURVIVORS, _SURVIVORS_EACH = 128, 8


def why_not(msa: MsaConfig, head_dim: int) -> str:
    """Why a model's routing needs the formula; empty when the kernels compute it."""
    if msa.head_reduce is not HeadReduce.MEAN or msa.chunk_reduce is not ChunkReduce.MAX:
        return "the model reduces heads or chunks otherwise than the kernels do"
    if msa.query_reduce is QueryReduce.MEAN:
        return "the model takes the mean over tokens"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"a head has {head_dim} dimensions, no power of two of at least 16"
    return ""


@dataclass
class Asked:
    """One row: its place among the pass's segments, and the tokens that vote (in the pass).

    chosen: positions by model layer, best first, as far as known. others: positions whose scores a
    ranking will ask for, whether they are among the best or not.
    """

    place: int
    resident: ResidentKeys
    voters: Sequence[int]
    k: int
    chosen: dict[int, Positions] = field(default_factory=dict)
    others: Positions = field(default_factory=lambda: np.empty(0, np.int64))


class KernelPass:
    """Scores and choices of one pass."""

    def __init__(
        self, asked: Sequence[Asked], msa: MsaConfig, *, together: bool, fused: bool
    ) -> None:
        """asked: not empty. together: all layers make one choice, by the mean of scores."""
        groups: dict[int, list[Asked]] = {}
        for one in asked:
            groups.setdefault(id(one.resident), []).append(one)
        self.asked = [one for group in groups.values() for one in group]
        self._memories = [group[0].resident for group in groups.values()]
        self._counts = [len(group) for group in groups.values()]
        self._msa, self._layers = msa, list(msa.routed_layers)
        self._together, self._fused = together, fused
        self._batch = Batch.of(self._memories, self._counts)
        self._k = max(one.k for one in asked)
        device = self._batch.device
        self._tokens = padded_tokens(len(one.voters) for one in asked)
        # Of every padded row the token that it is made of, or -1.
        sources = np.full((len(self.asked), self._tokens), -1, np.int64)
        for row, one in zip(sources, self.asked, strict=True):
            row[: len(one.voters)] = one.voters
        sources_R = moved(torch.from_numpy(sources.ravel()), device)
        self._bias_R = torch.zeros(sources.size, device=device)
        self._bias_R.masked_fill_(sources_R < 0, -torch.inf)
        self._sources_R = sources_R.clamp_min_(0)  # of a row that never wins, any token
        self._two_stage = self._memories[0].two_stage
        self._shards = [one.shard for one in self._memories if one.shard is not None]
        assert len(self._shards) in (0, len(self._memories)), "ranks hold all memories or none"
        self._questions: dict[int, torch.Tensor] = {}
        self._scores: dict[int, torch.Tensor] = {}

    def route(self, layer: int, routing_THD: torch.Tensor, num_kv_heads: int) -> None:
        """Scores one layer (its model index) and, unless layers choose together, chooses."""
        query_RHD = scaled_query(routing_THD[self._sources_R], self._msa)
        rows_RE = mean_heads(query_RHD, num_kv_heads)
        rows = Rows.padded(self._tokens, rows_RE, self._bias_R, self._batch.first)
        scores = self._batch.score(self._layers.index(layer), rows, fused=self._fused)
        self._scores[layer] = scores
        if self._two_stage:
            self._questions[layer] = rows_RE
        if self._together:
            return
        best = self._refine([layer], scores) if self._two_stage else self._best(scores, self._k)
        for one, positions in zip(self.asked, best, strict=True):
            one.chosen[layer] = positions[: one.k]

    def choose_together(self) -> None:
        """One choice for all layers that were scored, by the mean of their scores."""
        mean = torch.stack(list(self._scores.values())).mean(dim=0)
        if self._two_stage:
            best = self._refine(list(self._scores), mean)
        else:
            best = self._best(mean, self._k)
        for one, positions in zip(self.asked, best, strict=True):
            one.chosen = dict.fromkeys(self._layers, positions[: one.k])

    def boards(self) -> list[DeviceBoard]:
        """All scores of each row, in the order of `asked`."""
        scores, documents = self._scores, list(self._batch.plan.asked)
        if self._shards:
            scores, documents = self._gathered()
        firsts = np.cumsum([0, *documents]).tolist()
        rows = [
            Ranked(first, size, one.chosen, one.others)
            for first, size, one in zip(firsts, documents, self.asked, strict=False)
        ]
        return boards(scores, rows, together=self._together)

    def _gathered(self) -> tuple[dict[int, torch.Tensor], list[int]]:
        """Scores of all ranks' documents, laid out as a rank lays out its own, and how many
        documents there are of each row."""
        parts = [self._batch.plan.split(flat) for flat in self._scores.values()]
        found = []
        for memory, count in enumerate(self._counts):
            for question in range(count):
                scores_Ln = torch.stack([split[memory][question] for split in parts])
                found.append(gather_scores(scores_Ln, self._shards[memory]))
        flats = torch.cat(found, dim=1)
        return dict(zip(self._scores, flats, strict=True)), [one.shape[1] for one in found]

    def _best(self, scores: torch.Tensor, k: int, *, own: bool = False) -> list[Positions]:
        """Best first. own: of this rank's documents alone, by their places among these."""
        keys_BK = kernels.best_keys(self._batch.plan, scores, k, fused=self._fused)
        return self._read(keys_BK, own=own)

    def _read(self, keys_BK: torch.Tensor, *, own: bool = False) -> list[Positions]:
        if self._shards and not own:
            firsts = np.repeat([shard.own[0] for shard in self._shards], self._counts)
            keys_BK = merge(keys_BK, firsts.tolist(), LOWEST)
        return [places[scores_K > INVALID] for places, scores_K in kernels.read_keys(keys_BK)]

    def _refine(self, layers: Sequence[int], coarse: torch.Tensor) -> list[Positions]:
        """The best by exact scores (their mean over `layers`) of the coarse scores' best.

        The exact scores take the place of the coarse ones.
        """
        most = max(_SURVIVORS, _SURVIVORS_EACH * self._k)
        survivors = self._best(coarse, most, own=True)
        kept, row = list[Positions](), 0
        for count in self._counts:
            kept.append(np.unique(np.concatenate(survivors[row : row + count])))
            row += count
        exact, scores = self._exact(layers, kept), []
        kept_M = [torch.from_numpy(places).to(exact.device) for places in kept]
        for place, layer in enumerate(layers):
            rows = Rows.padded(self._tokens, self._questions[layer], self._bias_R, exact.first)
            flat = exact.score(place, rows, fused=self._fused)
            coarse_parts = self._batch.plan.split(self._scores[layer])
            for found_Bn, all_BN, kept_n in zip(
                exact.plan.split(flat), coarse_parts, kept_M, strict=True
            ):
                all_BN[:, kept_n] = found_Bn
            scores.append(flat)
        mean = torch.stack(scores).mean(dim=0)
        keys_BK = kernels.best_keys(exact.plan, mean, self._k, fused=self._fused)
        return self._read(self._placed(keys_BK, kept_M))

    def _placed(self, keys_BK: torch.Tensor, kept_M: Sequence[torch.Tensor]) -> torch.Tensor:
        """Order keys that name documents by their places among `kept_M`, of each memory, by those
        in the memory."""
        owners = [memory for memory, count in enumerate(self._counts) for _ in range(count)]
        rows = []
        for owner, keys_K in zip(owners, keys_BK, strict=True):
            places_K = (0xFFFFFFFF - (keys_K & 0xFFFFFFFF)).clamp_max(len(kept_M[owner]) - 1)
            moved_K = kept_M[owner][places_K] - places_K
            rows.append(torch.where(keys_K == LOWEST, keys_K, keys_K - moved_K))
        return torch.stack(rows)

    def _exact(self, layers: Sequence[int], kept: Sequence[Positions]) -> Batch:
        """Exact keys of these documents of each memory in these layers, on the device."""
        places = [self._layers.index(layer) for layer in layers]
        storing, device = KeyStorage(group=self._batch.first.group), self._batch.device
        spans, stacks = [], []
        for memory, documents_n in zip(self._memories, kept, strict=True):
            offsets_n1, keys_lcE = memory.exact(places, documents_n)
            spans.append(Spans.of(offsets_n1, device))
            stacks.append(storing.stack(keys_lcE.to(device)))
        return Batch.over(Plan.of(spans, self._counts), stacks)


def voters_of(votes: Sequence[bool], first: int, last: int | None, msa: MsaConfig) -> list[int]:
    """Tokens of the pass that vote for a row which begins at `first`; see routing.prepare."""
    voters = [place for place, vote in enumerate(votes) if vote]
    if msa.query_reduce is QueryReduce.LAST and voters:
        chosen = voters[-1] if last is None else last
        voters = [place for place in voters if place == chosen]
    return [first + place for place in voters]
