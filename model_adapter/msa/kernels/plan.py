"""Which program scores which chunks: worked out once, the same for every layer.

A tile is up to TILE_CHUNKS consecutive chunks of one memory. Tiles begin and end with a
document, so that a document's maximum is written by one program; only a document that is
longer than a tile is shared by several, which then write its maximum atomically (a
maximum comes out the same in any order). Memories of different sizes lie one after the
other: nothing is padded to the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

#: Chunks of one program.
TILE_CHUNKS = 128

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Spans:
    """A memory's documents. tiles_T3: int32 (first chunk, chunks, shared) per tile;
    document_C: int32 position of the document that each chunk belongs to."""

    documents: int
    chunks: int
    tiles_T3: torch.Tensor
    document_C: torch.Tensor

    @classmethod
    def of(cls, offsets_N1: Offsets, device: torch.device) -> Spans:
        """Document n owns chunks [offsets_N1[n], offsets_N1[n + 1]), at least one."""
        counts_N = np.diff(offsets_N1)
        document_C = np.repeat(np.arange(len(counts_N), dtype=np.int32), counts_N)
        return cls(
            documents=len(counts_N),
            chunks=int(offsets_N1[-1]),
            tiles_T3=torch.from_numpy(_tiles(offsets_N1)).to(device),
            document_C=torch.from_numpy(document_C).to(device),
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """Questions over memories: question b of memory m has its score of document n at
    first_m + b * documents_m + n of one flat array.

    tiles_T4: int32 (memory, first chunk, chunks, shared); memories_M4: int64 (first
    question, questions, first score, documents).
    """

    spans: tuple[Spans, ...]
    questions: tuple[int, ...]
    tiles_T4: torch.Tensor
    memories_M4: torch.Tensor
    size: int

    @classmethod
    def of(cls, spans: Sequence[Spans], questions: Sequence[int]) -> Plan:
        """questions: how many over each memory, whose rows come in this order."""
        device = spans[0].tiles_T3.device
        tiles, memories = [], []
        question = size = 0
        for index, (memory, count) in enumerate(zip(spans, questions, strict=True)):
            owner_T = memory.tiles_T3.new_full((memory.tiles_T3.shape[0], 1), index)
            tiles.append(torch.cat((owner_T, memory.tiles_T3), dim=1))
            memories.append((question, count, size, memory.documents))
            question, size = question + count, size + count * memory.documents
        table_M4 = torch.tensor(memories, dtype=torch.int64, device=device)
        return cls(tuple(spans), tuple(questions), torch.cat(tiles), table_M4, size)

    def split(self, scores: torch.Tensor) -> list[torch.Tensor]:
        """The flat array as one [questions, documents] per memory."""
        sizes = [
            count * spans.documents for spans, count in zip(self.spans, self.questions, strict=True)
        ]
        parts = torch.split(scores, sizes)
        return [
            part.view(count, spans.documents)
            for part, spans, count in zip(parts, self.spans, self.questions, strict=True)
        ]


def _tiles(offsets_N1: Offsets) -> npt.NDArray[np.int32]:
    """Packs whole documents into tiles, greedily; splits those that are longer than one."""
    tiles: list[tuple[int, int, int]] = []
    document, documents = 0, len(offsets_N1) - 1
    while document < documents:
        first = int(offsets_N1[document])
        # The last document that ends within a tile from here.
        stop = int(np.searchsorted(offsets_N1, first + TILE_CHUNKS, side="right")) - 1
        if stop > document:
            tiles.append((first, int(offsets_N1[stop]) - first, 0))
            document = stop
            continue
        end = int(offsets_N1[document + 1])
        for start in range(first, end, TILE_CHUNKS):
            tiles.append((start, min(TILE_CHUNKS, end - start), 1))
        document += 1
    return np.array(tiles, dtype=np.int32).reshape(-1, 3)
