"""Routing speed: the reduced single product against the straightforward formula.

    python -m benchmarks.routing --device cpu --json
    python -m benchmarks.routing --device cuda --json    (benchmarks/routing_cuda.py)

Both score the same memory (by default 100,000 chunks in about 33,400 documents, 8 kv
heads, 32 query heads, head dim 128, 32 question tokens) in one run, alternating, and
medians are reported. The straightforward formula copies the keys of each kv head once
per query head of its group, materialises [heads, tokens, chunks], and reduces over
heads, tokens and chunks, in the dtype of its inputs. `same_top_k` compares the choice
with scores of the same inputs accumulated and kept in fp32; for bf16,
`plain_agreement` says how many of the k the straightforward bf16 formula finds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.msa.config import MsaConfig
from model_adapter.msa.routing import RoutingQuery, prepare, score_documents, select

KV_HEADS, HEADS, HEAD_DIM, TOKENS, TOP_K = 8, 32, 128, 32, 16
#: Chunks that the published reference scores at once.
REFERENCE_SLICE = 16384


@dataclass(frozen=True)
class Keys:
    """A memory of routing keys only: one slab."""

    keys_CE: torch.Tensor
    chunk_offsets_N1: npt.NDArray[np.int64]

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        """Documents are numbered from 1."""
        return np.arange(1, len(self.chunk_offsets_N1), dtype=np.int64)

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The same slab for every layer."""
        yield 0, self.keys_CE

    def content(self, layer: int, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Routing must never come here."""
        raise NotImplementedError("routing reads no content")

    def text(self, number: int) -> str:
        """There are no texts."""
        raise KeyError(number)


def make_memory(chunks: int, dtype: torch.dtype, device: torch.device, seed: int) -> Keys:
    """Random keys; documents of 1 to 5 chunks, 3 on average."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (chunks, KV_HEADS * HEAD_DIM)
    keys_CE = torch.randn(size, generator=generator, device=device).to(dtype)
    lengths = np.random.default_rng(seed).integers(1, 6, size=chunks)
    ends = np.cumsum(lengths)
    ends = ends[ends < chunks]
    return Keys(keys_CE, np.concatenate(([0], ends, [chunks])).astype(np.int64))


def straightforward(q_THD: torch.Tensor, keys_CE: torch.Tensor, memory: Keys) -> torch.Tensor:
    """Document scores [N] by the formula as written."""
    keys_CKD = keys_CE.view(-1, KV_HEADS, HEAD_DIM)
    keys_HCD = keys_CKD.permute(1, 0, 2).repeat_interleave(HEADS // KV_HEADS, dim=0)
    scores_HTC = (q_THD * HEAD_DIM**-0.5).permute(1, 0, 2) @ keys_HCD.transpose(1, 2)
    return _documents(scores_HTC.mean(dim=0).amax(dim=0), memory)


def reference(
    q_THD: torch.Tensor, keys_CE: torch.Tensor, votes_T: torch.Tensor, memory: Keys
) -> torch.Tensor:
    """Positions of the TOP_K documents by the published reference's formula, from its description:
    slices of chunks; scores [B, kv heads, query heads of each, T, chunks] by one broadcast product,
    which copies the keys for every query head; tokens that do not vote at the dtype's minimum; the
    mean over heads, then the maxima over tokens and over a document's chunks. B is 1 here."""
    tokens, group = q_THD.shape[0], HEADS // KV_HEADS
    q_BHTD = (q_THD * HEAD_DIM**-0.5).permute(1, 0, 2)[None]
    q_BKGTD = q_BHTD.reshape(1, KV_HEADS, group, tokens, HEAD_DIM)
    silent_T1 = ~votes_T[:, None]
    parts = []
    for keys_cE in torch.split(keys_CE, REFERENCE_SLICE):
        keys_BK1Dc = keys_cE.view(-1, KV_HEADS, HEAD_DIM).permute(1, 2, 0)[None, :, None]
        scores_BKGTc = torch.matmul(q_BKGTD, keys_BK1Dc)
        scores_BKGTc.masked_fill_(silent_T1, torch.finfo(scores_BKGTc.dtype).min)
        parts.append(scores_BKGTc.flatten(1, 2).mean(dim=1).amax(dim=1)[0])
    return _documents(torch.cat(parts), memory).topk(TOP_K).indices


def _documents(scores_C: torch.Tensor, memory: Keys) -> torch.Tensor:
    """[N]: the best chunk of each document."""
    device = scores_C.device
    counts_N = torch.from_numpy(np.diff(memory.chunk_offsets_N1)).to(device)
    document_C = torch.repeat_interleave(torch.arange(len(counts_N), device=device), counts_N)
    scores_N = torch.full((len(counts_N),), -torch.inf, dtype=scores_C.dtype, device=device)
    return scores_N.scatter_reduce_(0, document_C, scores_C, "amax")


def reduced(q_THD: torch.Tensor, memory: Keys, msa: MsaConfig) -> npt.NDArray[np.int64]:
    """The engine's own routing, from raw routing queries to the chosen documents."""
    votes_T = torch.ones(q_THD.shape[0], dtype=torch.bool, device=q_THD.device)
    query = prepare(q_THD, votes_T, KV_HEADS, msa, k=TOP_K)
    assert isinstance(query, RoutingQuery)
    return select(score_documents(query, memory, 0), TOP_K)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run(dtype: torch.dtype, device: torch.device, chunks: int, repeats: int) -> dict[str, object]:
    """One dtype's comparison."""
    msa = MsaConfig(routed_layers=(0,), aux_loss_method="INFONCE_DECOUPLE")
    memory = make_memory(chunks, dtype, device, seed=0)
    generator = torch.Generator().manual_seed(1)
    q_THD = torch.randn(TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype).to(device)
    ours = reduced(q_THD, memory, msa)  # warms up
    plain_N = straightforward(q_THD, memory.keys_CE, memory).float().cpu().numpy()
    exact_N = plain_N
    if dtype is not torch.float32:
        exact_N = straightforward(q_THD.float(), memory.keys_CE.float(), memory).cpu().numpy()
    plain_s, reduced_s = [], []
    for _ in range(repeats):
        plain_s.append(_seconds(lambda: straightforward(q_THD, memory.keys_CE, memory), device))
        reduced_s.append(_seconds(lambda: reduced(q_THD, memory, msa), device))
    plain, fast = statistics.median(plain_s), statistics.median(reduced_s)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "chunks": chunks,
        "documents": len(memory.numbers_N),
        "straightforward_s": round(plain, 5),
        "reduced_s": round(fast, 5),
        "speedup": round(plain / fast, 1),
        "same_top_k": sorted(ours) == sorted(select(exact_N, TOP_K)),
        "same_order": list(ours) == list(select(exact_N, TOP_K)),
        "plain_agreement": len(set(ours) & set(select(plain_N, TOP_K))),
        "top_k": TOP_K,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", type=int, help="100,000; on a GPU 1,562,500 at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch finds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        from benchmarks import routing_cuda  # noqa: PLC0415  # it imports this module

        with torch.inference_mode():
            print(json.dumps(routing_cuda.run(arguments.repeats, arguments.chunks or 1_562_500)))
        return
    with torch.inference_mode():
        results = [
            run(dtype, device, arguments.chunks or 100_000, arguments.repeats)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    if arguments.json:
        print(
            json.dumps(
                {"device": str(device), "threads": torch.get_num_threads(), "results": results}
            )
        )
        return
    for result in results:
        print(
            f"{result['dtype']}: {result['straightforward_s']} s straightforward, "
            f"{result['reduced_s']} s reduced, {result['speedup']}x, "
            f"same top {TOP_K}: {result['same_top_k']}"
        )


if __name__ == "__main__":
    main()
