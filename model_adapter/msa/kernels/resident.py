"""Routing keys of whole memories as they lie on the device, and many of them as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from model_adapter.msa.kernels import score as scoring
from model_adapter.msa.kernels.keys import KeyStack, KeyStorage, RoutingKeys
from model_adapter.msa.kernels.launches import Addresses, Scoring
from model_adapter.msa.kernels.plan import Offsets, Plan, Spans
from model_adapter.msa.kernels.rows import Rows
from model_adapter.msa.kernels.sharding import Shard


@dataclass(frozen=True, eq=False)
class Part:
    """Keys of consecutive documents of a memory, from first_chunk on.

    exact_LCE: the same in host RAM in the layout's own type, where keys are coarse.
    """

    first_chunk: int
    spans: Spans
    keys: KeyStack
    exact_LCE: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class ResidentKeys:
    """All routing keys of a memory's snapshot. Document n owns chunks firsts_N[n] to ends_N[n]
    (exclusive), counted over all parts.

    shard: set where these are a rank's own documents of a memory that several ranks hold.
    """

    firsts_N: Offsets
    ends_N: Offsets
    parts: tuple[Part, ...]
    shard: Shard | None = None

    @property
    def documents(self) -> int:
        """Of the memory."""
        return len(self.firsts_N)

    @property
    def two_stage(self) -> bool:
        """The keys on the device only say which documents to look at in host RAM."""
        return self.parts[0].exact_LCE is not None

    @classmethod
    def of(
        cls,
        offsets_N1: Offsets,
        keys_LCE: torch.Tensor,
        storing: KeyStorage,
        device: torch.device,
    ) -> ResidentKeys:
        """One part, made of a memory's keys [L, C, E] in RAM."""
        exact_LCE = keys_LCE if storing.exact else None
        part = Part(0, Spans.of(offsets_N1, device), storing.stack(keys_LCE.to(device)), exact_LCE)
        return cls(offsets_N1[:-1], offsets_N1[1:], (part,))

    def only(self, positions_n: Offsets) -> ResidentKeys:
        """The memory as if it held these documents (ascending) alone. Nothing is copied but
        whose chunk is whose."""
        place_N = np.full(self.documents, -1, dtype=np.int32)
        place_N[positions_n] = np.arange(len(positions_n), dtype=np.int32)
        place_dev_N = torch.from_numpy(place_N).to(self.parts[0].spans.document_C.device)
        parts = []
        for part in self.parts:
            document_C = place_dev_N[part.spans.document_C.long()]
            spans = replace(
                part.spans, documents=len(positions_n), document_C=document_C, covered=0
            )
            parts.append(replace(part, spans=spans))
        return ResidentKeys(self.firsts_N[positions_n], self.ends_N[positions_n], tuple(parts))

    def exact(self, layers: Sequence[int], documents_n: Offsets) -> tuple[Offsets, torch.Tensor]:
        """Offsets of the chunks of these documents (ascending); exact keys [l, c, E] in RAM."""
        counts_n = self.ends_N[documents_n] - self.firsts_N[documents_n]
        compact_n1 = np.concatenate(([0], np.cumsum(counts_n))).astype(np.int64)
        begin = np.repeat(self.firsts_N[documents_n] - compact_n1[:-1], counts_n)
        chunks = begin + np.arange(compact_n1[-1])
        pieces = []
        for part in self.parts:
            assert part.exact_LCE is not None
            first, stop = np.searchsorted(
                chunks, (part.first_chunk, part.first_chunk + part.spans.chunks)
            )
            rows = torch.from_numpy(chunks[first:stop] - part.first_chunk)
            found = [part.exact_LCE[layer].index_select(0, rows) for layer in layers]
            pieces.append(torch.stack(found))
        return compact_n1, torch.cat(pieces, dim=1)


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions over resident memories in all layers. Addresses are worked out once.

    first: keys of one part in one layer, whose kind all have.
    """

    plan: Plan
    stacks: tuple[KeyStack, ...]
    addresses: Addresses
    first: RoutingKeys
    _scorings: dict[int, Scoring] = field(default_factory=dict)

    @classmethod
    def of(cls, memories: Sequence[ResidentKeys], questions: Sequence[int]) -> Batch:
        """questions: how many over each memory. All keys are of one format, width and group."""
        plan = Plan.of([[part.spans for part in one.parts] for one in memories], questions)
        return cls.over(plan, [part.keys for one in memories for part in one.parts])

    @classmethod
    def over(cls, plan: Plan, stacks: Sequence[KeyStack]) -> Batch:
        """stacks: of the plan's parts."""
        scales = [one.values_LCE if one.scale_LCS is None else one.scale_LCS for one in stacks]
        documents = [one.document_C for one in plan.parts]
        addresses = Addresses.of([one.values_LCE for one in stacks], scales, documents)
        return cls(plan, tuple(stacks), addresses, stacks[0].layer(0))

    @property
    def device(self) -> torch.device:
        """Where the keys lie."""
        return self.first.values_CE.device

    def score(self, layer: int, rows: Rows, *, fused: bool) -> torch.Tensor:
        """Flat fp32 scores of one layer, as the plan lays them out."""
        if not fused:
            keys = [
                stack.layer(layer, 0, spans.chunks)
                for stack, spans in zip(self.stacks, self.plan.parts, strict=True)
            ]
            return scoring.score(self.plan, keys, rows, fused=False)
        if rows.tokens not in self._scorings:
            made = Scoring(self.plan, self.first, self.addresses, rows.tokens)
            self._scorings[rows.tokens] = made
        return self._scorings[rows.tokens](layer, rows)
