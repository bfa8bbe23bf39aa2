"""Encoded documents: kept on disk between runs, and read as a memory.

A shard of at most SHARD documents is one safetensors file, named by a hash over the model
identity and the documents' numbers and texts. So another model or another text is another
file, and what is there is never stale. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.progress import Advance
from model_adapter.engine import DocumentText, Engine
from model_adapter.msa.encode import from_bits
from storage.layout import NUMPY_DTYPE, Bits, KVBlock, KVLayout

#: Documents of one file.
SHARD = 1024
#: Documents of one encode call.
BATCH = 256

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Blocks of N documents, ascending by number, as one array per kind.

    arrays: "routing", "key" and "value", each [L, C, E] in the layout's bits; "key" only when
    the layout has separate routing keys, and only "routing" where content was not asked for.
    seconds: what encoding took when it was done.
    """

    layout: KVLayout
    numbers_N: Numbers
    tokens_N: Numbers
    arrays: Mapping[str, Bits]
    seconds: float

    @property
    def offsets_N1(self) -> Numbers:
        """Document n owns chunks [offsets[n], offsets[n + 1])."""
        counts = -(-self.tokens_N // self.layout.pool_tokens)
        return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self.tokens_N.sum())

    @property
    def block_bytes(self) -> int:
        """Of all blocks, as they are stored uncompressed."""
        return sum(self.layout.block_bytes(int(tokens)) for tokens in self.tokens_N)

    def first(self, documents: int) -> Encoded:
        """The first so many documents; the arrays are views."""
        chunks = int(self.offsets_N1[documents])
        return replace(
            self,
            numbers_N=self.numbers_N[:documents],
            tokens_N=self.tokens_N[:documents],
            arrays={kind: array[:, :chunks] for kind, array in self.arrays.items()},
        )

    def take(self, numbers: Sequence[int]) -> Encoded:
        """These documents, as far as they are there, as copies in ascending order."""
        kept = np.flatnonzero(np.isin(self.numbers_N, np.asarray(numbers, dtype=np.int64)))
        return self._gather(kept)

    def routing_only(self) -> Encoded:
        """Without content."""
        return replace(self, arrays={"routing": self.arrays["routing"]})

    def _gather(self, places: npt.NDArray[np.intp]) -> Encoded:
        offsets = self.offsets_N1
        spans = [np.arange(offsets[n], offsets[n + 1]) for n in places]
        chunks = np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)
        return replace(
            self,
            numbers_N=self.numbers_N[places],
            tokens_N=self.tokens_N[places],
            arrays={kind: array[:, chunks] for kind, array in self.arrays.items()},
        )


def join(parts: Sequence[Encoded]) -> Encoded:
    """All documents of the parts, which share a layout and no number, in ascending order."""
    kinds = parts[0].arrays.keys()
    whole = Encoded(
        parts[0].layout,
        np.concatenate([part.numbers_N for part in parts]),
        np.concatenate([part.tokens_N for part in parts]),
        {kind: np.concatenate([part.arrays[kind] for part in parts], axis=1) for kind in kinds},
        sum(part.seconds for part in parts),
    )
    if np.all(np.diff(whole.numbers_N) > 0):
        return whole
    return whole._gather(np.argsort(whole.numbers_N))


class EncodedView:
    """model_adapter.engine.MemoryView over encoded documents and their texts."""

    def __init__(
        self, encoded: Encoded, texts: Mapping[int, str], device: str | torch.device = "cpu"
    ) -> None:
        """device: where routing keys stay; content is brought there when it is read."""
        self._encoded, self._texts, self._device = encoded, texts, torch.device(device)
        self._offsets_N1 = encoded.offsets_N1
        self._routing_LCE = from_bits(encoded.arrays["routing"]).to(self._device)

    @property
    def numbers_N(self) -> Numbers:
        """Document numbers, ascending."""
        return self._encoded.numbers_N

    @property
    def chunk_offsets_N1(self) -> Numbers:
        """Document n owns chunks [offsets[n], offsets[n + 1])."""
        return self._offsets_N1

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """All of them as one slab."""
        if len(self.numbers_N):
            yield 0, self._routing_LCE[layer]

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [c, E] of the documents at these positions, in order."""
        arrays = self._encoded.arrays
        keys = arrays["key"] if "key" in arrays else arrays["routing"]
        return self._rows(keys, layer, documents), self._rows(arrays["value"], layer, documents)

    def _rows(self, array_LCE: Bits, layer: int, documents: Sequence[int]) -> torch.Tensor:
        offsets = self._offsets_N1
        spans = [np.arange(offsets[n], offsets[n + 1]) for n in documents]
        rows_cE: Bits = array_LCE[layer, np.concatenate(spans)]
        return from_bits(rows_cE).to(self._device)

    def text(self, number: int) -> str:
        """Raises KeyError for an unknown number."""
        return self._texts[number]


class BlockCache:
    """Encodes documents, or reads them from the folder when it has them."""

    def __init__(self, folder: Path, engine: Engine, *, content: bool = True) -> None:
        """content: False keeps and reads routing keys alone, all that ranking needs."""
        self._folder, self._engine, self._content = folder, engine, content

    def encode(self, texts: Mapping[int, str], advance: Advance = lambda _: None) -> Encoded:
        """The documents, in ascending order of their numbers.

        One that the engine refuses is missing from the result. advance: told the documents
        that are done.
        """
        documents = [DocumentText(number, texts[number]) for number in sorted(texts)]
        shards = []
        for start in range(0, len(documents), SHARD):
            shard = documents[start : start + SHARD]
            path = self._path(shard)
            with_content = path.with_suffix(".full.safetensors")
            if self._content or with_content.is_file():
                path = with_content
            if path.is_file():
                advance(len(shard))
            else:
                _write(path, self._encode(shard, advance))
            shards.append(self._read(path))
        return join(shards)

    def _path(self, shard: Sequence[DocumentText]) -> Path:
        identity = self._engine.description.identity
        digest = hashlib.sha256(identity.encode())
        for document in shard:
            digest.update(json.dumps([document.number, document.text]).encode())
        return self._folder / identity[:16] / f"{digest.hexdigest()[:32]}.safetensors"

    def _encode(self, shard: Sequence[DocumentText], advance: Advance) -> Encoded:
        blocks: list[KVBlock] = []
        started = time.perf_counter()
        for start in range(0, len(shard), BATCH):
            batch = shard[start : start + BATCH]
            blocks += self._engine.encode(batch).blocks
            advance(len(batch))
        seconds = time.perf_counter() - started
        blocks.sort(key=lambda block: block.number)
        encoded = of_blocks(blocks, self._engine.description.layout, seconds)
        return encoded if self._content else encoded.routing_only()

    def _read(self, path: Path) -> Encoded:
        with safe_open(path, framework="numpy") as file:
            kinds = {"routing", "key", "value"} if self._content else {"routing"}
            kinds &= set(file.keys())
            return Encoded(
                self._engine.description.layout,
                file.get_tensor("numbers"),
                file.get_tensor("tokens"),
                {kind: file.get_tensor(kind) for kind in sorted(kinds)},
                float(file.get_tensor("seconds")[0]),
            )


def of_blocks(blocks: Sequence[KVBlock], layout: KVLayout, seconds: float = 0.0) -> Encoded:
    """Blocks in ascending order of their numbers as one."""
    empty = np.empty((len(layout.routed_layers), 0, layout.width), NUMPY_DTYPE[layout.dtype])
    arrays: dict[str, Bits] = {
        "routing": np.concatenate([empty, *(b.routing_key_LCE for b in blocks)], axis=1),
        "value": np.concatenate([empty, *(b.value_LCE for b in blocks)], axis=1),
    }
    if layout.separate_routing_keys:
        keys = [block.key_LCE for block in blocks if block.key_LCE is not None]
        arrays["key"] = np.concatenate([empty, *keys], axis=1)
    numbers = np.array([block.number for block in blocks], dtype=np.int64)
    tokens = np.array([block.tokens for block in blocks], dtype=np.int64)
    return Encoded(layout, numbers, tokens, arrays, seconds)


def _write(path: Path, encoded: Encoded) -> None:
    """Whole or not at all, also when two runs write the same shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    seconds = np.array([encoded.seconds])
    described = {"numbers": encoded.numbers_N, "tokens": encoded.tokens_N, "seconds": seconds}
    save_file({**encoded.arrays, **described}, partial)
    partial.replace(path)
