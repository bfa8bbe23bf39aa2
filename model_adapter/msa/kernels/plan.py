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
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

#: Chunks of one program.
TILE_CHUNKS = 128

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Spans:
    """The documents of a memory, or of a part of it whose keys lie together.

    documents: of the whole memory. chunks: of this part. covered: documents that one tile each is
    sure to score, or 0. tiles_T3: int32 (first chunk, chunks, shared) per tile; document_C: int32
    position in the memory of the document that each chunk belongs to, or -1 for one that does not
    count.
    """

    documents: int
    chunks: int
    covered: int
    tiles_T3: torch.Tensor
    document_C: torch.Tensor

    @classmethod
    def of(
        cls, offsets_N1: Offsets, device: torch.device, first: int = 0, documents: int = 0
    ) -> Spans:
        """The part's document n owns chunks [offsets_N1[n], offsets_N1[n + 1]), at least one.

        first: position of its first document in the memory of `documents`, by default of these.
        """
        counts_N = np.diff(offsets_N1)
        positions_N = np.arange(first, first + len(counts_N), dtype=np.int32)
        tiles_T3 = _tiles(offsets_N1)
        return cls(
            documents=documents or first + len(counts_N),
            chunks=int(offsets_N1[-1]),
            covered=0 if tiles_T3[:, 2].any() else len(counts_N),
            tiles_T3=torch.from_numpy(tiles_T3).to(device),
            document_C=torch.from_numpy(np.repeat(positions_N, counts_N)).to(device),
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """Questions over memories: question b of memory m has its score of document n at
    first_m + b * documents_m + n of one flat array.

    parts: of all memories in order; owners: the memory of each. tiles_T4: int32 (part,
    first chunk, chunks, shared); parts_P4: int64 (first question, questions, first score,
    documents) of the part's memory; questions_B2: int64 (first score, documents). done_B: int32
    zeros, for the kernel that chooses. whole: every score is stored by one program.
    """

    parts: tuple[Spans, ...]
    owners: tuple[int, ...]
    documents: tuple[int, ...]
    questions: tuple[int, ...]
    tiles_T4: torch.Tensor
    parts_P4: torch.Tensor
    questions_B2: torch.Tensor
    done_B: torch.Tensor
    size: int
    whole: bool

    @classmethod
    def of(cls, memories: Sequence[Spans | Sequence[Spans]], questions: Sequence[int]) -> Plan:
        """questions: how many over each memory, whose rows come in this order."""
        parts, owners, documents, tiles = list[Spans](), list[int](), list[int](), []
        rows, scores = list[tuple[int, ...]](), list[tuple[int, int]]()
        question = size = 0
        whole = True
        for memory, count in zip(memories, questions, strict=True):
            own = (memory,) if isinstance(memory, Spans) else memory
            for spans in own:
                tiles_T3 = spans.tiles_T3
                owner_T = tiles_T3.new_full((tiles_T3.shape[0], 1), len(parts))
                tiles.append(torch.cat((owner_T, tiles_T3), dim=1))
                rows.append((question, count, size, own[0].documents))
                parts.append(spans)
                owners.append(len(documents))
            documents.append(own[0].documents)
            whole &= sum(spans.covered for spans in own) == own[0].documents
            scores += [
                (size + own[0].documents * asked, own[0].documents) for asked in range(count)
            ]
            question, size = question + count, size + count * own[0].documents
        device = parts[0].tiles_T3.device
        return cls(
            tuple(parts),
            tuple(owners),
            tuple(documents),
            tuple(questions),
            tiles_T4=torch.cat(tiles),
            parts_P4=torch.tensor(rows, dtype=torch.int64).to(device),
            questions_B2=torch.tensor(scores, dtype=torch.int64).to(device),
            done_B=torch.zeros(len(scores), dtype=torch.int32, device=device),
            size=size,
            whole=whole,
        )

    @cached_property
    def asked(self) -> tuple[int, ...]:
        """Documents of each question's memory."""
        pairs = zip(self.documents, self.questions, strict=True)
        return tuple(documents for documents, count in pairs for _ in range(count))

    def split(self, scores: torch.Tensor) -> list[torch.Tensor]:
        """The flat array as one [questions, documents] per memory."""
        shapes = list(zip(self.questions, self.documents, strict=True))
        parts = torch.split(scores, [count * documents for count, documents in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
