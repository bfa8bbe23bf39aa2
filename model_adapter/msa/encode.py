"""Documents to compressed KV blocks (paper section 3.2).

Each document is encoded alone, at positions from 0. Several share the linear
layers, packed without padding; attention is computed per document, so that no token of
one reaches another: padded on the right under a causal mask, or on a GPU by torch's
kernel for sequences of different lengths.

Shape suffixes are those of model.py; B documents of a batch, P their longest length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from model_adapter.msa.config import MsaConfig
from model_adapter.msa.model import Decoder, Probe, Projected, Want
from model_adapter.msa.packed import PackedRows, moved, run_layers
from storage.layout import Bits, KVBlock

#: Tokens that share one pass; bounds activation memory.
BATCH_TOKENS = 4096
#: The same on a GPU, where documents of any lengths share a pass.
PACKED_TOKENS = 32768
#: Documents of one pass are at most this much longer than the shortest one, plus SLACK.
LENGTH_RATIO = 1.25
SLACK = 48


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's number and its composed tokens, controls included."""

    number: int
    ids: Sequence[int]


def packs(decoder: Decoder) -> bool:
    """Whether documents are attended to without padding: on a GPU, but for fp32."""
    return decoder.device.type == "cuda" and decoder.dtype is not torch.float32


def packed_batches(documents: Sequence[TokenisedDocument]) -> Iterator[list[TokenisedDocument]]:
    """Groups in the order given, each within PACKED_TOKENS (one longer document alone)."""
    batch, tokens = list[TokenisedDocument](), 0
    for document in documents:
        if batch and tokens + len(document.ids) > PACKED_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(document)
        tokens += len(document.ids)
    if batch:
        yield batch


def batches(documents: Sequence[TokenisedDocument]) -> Iterator[list[TokenisedDocument]]:
    """Groups of similar length, each within BATCH_TOKENS (one longer document alone)."""
    batch: list[TokenisedDocument] = []
    for document in sorted(documents, key=lambda item: (len(item.ids), item.number)):
        length = len(document.ids)
        if batch and (
            (len(batch) + 1) * length > BATCH_TOKENS
            or length > LENGTH_RATIO * len(batch[0].ids) + SLACK
        ):
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def encode_batch(
    decoder: Decoder, batch: Sequence[TokenisedDocument], probe: Probe | None = None
) -> list[KVBlock]:
    """Blocks of the documents of one batch, in its order. Every document has a token."""
    msa = decoder.config.msa
    lengths = [len(document.ids) for document in batch]
    rows = PackedRows(lengths, decoder.device, varlen=packs(decoder))
    ids_T = torch.tensor([token for document in batch for token in document.ids])
    hidden_TM = decoder.embed(ids_T.to(decoder.device))
    if probe is not None:
        probe("embed", hidden_TM)
    pooling = Pooling(rows.lengths, msa.pool_tokens, decoder.device)
    routing, key, value = [], [], []

    def keep(index: int, projected: Projected) -> None:
        assert projected.routing_TKD is not None
        routing.append(routing_keys(pooling, projected.routing_TKD, msa).to(decoder.dtype))
        value.append(pooling.mean(projected.v_TKD).flatten(1).to(decoder.dtype))
        if msa.decouple_router or msa.cosine:
            key.append(pooling.mean(projected.k_TKD).flatten(1).to(decoder.dtype))
        if probe is not None:
            probe(f"rk{index}", projected.routing_TKD.flatten(1))

    layers = range(msa.routed_layers[-1] + 1)
    run_layers(decoder, rows, hidden_TM, layers, want=Want.ROUTING_KEY, see=keep, probe=probe)
    routing_LCE, value_LCE = to_bits(torch.stack(routing)), to_bits(torch.stack(value))
    key_LCE = to_bits(torch.stack(key)) if key else None
    blocks = []
    for document, (first, stop) in zip(batch, pooling.spans, strict=True):
        blocks.append(
            KVBlock(
                number=document.number,
                tokens=len(document.ids),
                routing_key_LCE=_own(routing_LCE, first, stop),
                key_LCE=None if key_LCE is None else _own(key_LCE, first, stop),
                value_LCE=_own(value_LCE, first, stop),
            )
        )
    return blocks


class _ChunkSums(torch.autograd.Function):
    """Sums over each chunk's tokens in one order, which index_add_ does not have on a GPU."""

    @staticmethod
    def forward(
        ctx: Any, x_TE: torch.Tensor, slots_CP: torch.Tensor, chunk_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(chunk_T)
        filled_CPE = functional.pad(x_TE, (0, 0, 0, 1))[slots_CP]
        return filled_CPE.sum(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (chunk_T,) = ctx.saved_tensors
        return gradients[0].index_select(0, chunk_T), None, None


class Pooling:
    """Means over chunks of consecutive tokens of one document, exact: fp32 sums over
    the chunk's own tokens, divided by its true length.

    ordered: sum in the same order at every run, as index_add_ does on a CPU alone; by
    default on a GPU.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        pool_tokens: int,
        device: torch.device,
        *,
        ordered: bool | None = None,
    ) -> None:
        tokens = np.array(lengths)
        chunks = -(-tokens // pool_tokens)
        ends = chunks.cumsum()
        counts = np.full(ends[-1], pool_tokens)
        counts[ends - 1] = tokens - (chunks - 1) * pool_tokens
        #: First chunk of each document, and the one behind its last.
        self.spans: list[tuple[int, int]] = list(
            zip((ends - chunks).tolist(), ends.tolist(), strict=True)
        )
        self._chunk_T = moved(torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), device)
        self._counts_C = moved(torch.from_numpy(counts.astype(np.float32)), device)
        self._slots_CP: torch.Tensor | None = None
        if device.type == "cuda" if ordered is None else ordered:
            place = np.arange(pool_tokens)[None, :]
            slots = (counts.cumsum() - counts)[:, None] + place
            slots[place >= counts[:, None]] = counts.sum()
            self._slots_CP = moved(torch.from_numpy(slots), device)

    def mean(self, x_TKD: torch.Tensor) -> torch.Tensor:
        """[T, K, D] to fp32 [C, K, D]."""
        if self._slots_CP is not None:
            apply: Any = _ChunkSums.apply
            sums_CE = apply(x_TKD.flatten(1), self._slots_CP, self._chunk_T)
            mean_CKD: torch.Tensor = (
                sums_CE.view(-1, *x_TKD.shape[1:]) / self._counts_C[:, None, None]
            )
            return mean_CKD
        sums_CKD = x_TKD.new_zeros(
            (len(self._counts_C), *x_TKD.shape[1:]), dtype=torch.float32
        ).index_add_(0, self._chunk_T, x_TKD.float())
        return sums_CKD / self._counts_C[:, None, None]


def routing_keys(pooling: Pooling, routing_TKD: torch.Tensor, msa: MsaConfig) -> torch.Tensor:
    """fp32 routing keys [C, E] of the chunks: pooled, then normalised per head for cosine."""
    pooled_CKD = pooling.mean(routing_TKD)
    if msa.cosine:
        pooled_CKD = functional.normalize(pooled_CKD, dim=-1, eps=1e-12)
    return pooled_CKD.flatten(1)


def to_bits(tensor: torch.Tensor) -> Bits:
    """A bf16 or fp32 tensor as the numpy array that blocks hold."""
    tensor = tensor.contiguous().cpu()
    if tensor.dtype is torch.bfloat16:
        words: npt.NDArray[np.uint16] = tensor.view(torch.uint16).numpy()
        return words
    floats: npt.NDArray[np.float32] = tensor.numpy()
    return floats


def from_bits(bits: Bits) -> torch.Tensor:
    """The inverse of to_bits; shares memory with a writable array."""
    tensor = torch.from_numpy(bits if bits.flags.writeable else bits.copy())
    return tensor.view(torch.bfloat16) if bits.dtype == np.uint16 else tensor


def _own(bits_LCE: Bits, first: int, stop: int) -> Bits:
    return bits_LCE[:, first:stop].copy()
