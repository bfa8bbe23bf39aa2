"""Routing on a GPU: the fused kernels against the floor (bytes over bandwidth) and against
the straightforward formula. Run by `python -m benchmarks.routing --device cuda`.

Every figure is of one run on one machine. The shape is that of a 4B MSA model: 8 kv heads,
32 query heads, dim 128, 18 routed layers, 64 tokens a chunk; keys are random, documents
have 1 to 5 chunks. `over_floor` is the time of all layers, choosing included, over the larger
of two: the bytes of their keys at the bandwidth of a copy, and the products of both parts of
the questions at the rate of a large matrix product, each measured in the same run.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.rates import Rates, Timing
from benchmarks.routing import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    TOP_K,
    make_memory,
    reference,
    straightforward,
)
from model_adapter.msa import kernels
from model_adapter.msa.config import MsaConfig
from model_adapter.msa.kernel_pass import Asked, KernelPass
from model_adapter.msa.kernels import (
    Batch,
    KeyFormat,
    KeyStorage,
    Part,
    ResidentKeys,
    Rows,
    Spans,
)
from model_adapter.msa.kernels.plan import Offsets
from model_adapter.msa.kernels.score import fused_available
from model_adapter.msa.routing import prepare

POOL_TOKENS = 64
ONE_LAYER = MsaConfig(routed_layers=(0,), aux_loss_method="INFONCE_DECOUPLE")


@dataclass(frozen=True)
class Shape:
    """What is routed. width: kv heads x head dim; group: head dim."""

    layers: int = 18
    width: int = 1024
    group: int = 128
    tokens: int = 32
    k: int = 16


def some_offsets(chunks: int, seed: int) -> Offsets:
    """Documents of 1 to 5 chunks, 3 on average."""
    ends = np.cumsum(np.random.default_rng(seed).integers(1, 6, size=chunks))
    return np.concatenate(([0], ends[ends < chunks], [chunks])).astype(np.int64)


def some_memory(
    chunks: int,
    shape: Shape,
    storing: KeyStorage,
    device: torch.device,
    seed: int = 0,
    *,
    offsets_N1: Offsets | None = None,
) -> ResidentKeys:
    """Random keys of all layers; offsets_N1: of its documents, else some. Quantised piece by
    piece: the floats never lie there whole."""
    generator = torch.Generator(device).manual_seed(seed)
    offsets_N1 = some_offsets(chunks, seed) if offsets_N1 is None else offsets_N1
    size = (shape.layers, chunks, shape.width)
    stack = storing.empty(size, torch.bfloat16, device)
    exact_LCE = torch.empty(size, dtype=torch.bfloat16) if storing.exact else None
    for layer in range(shape.layers):
        for first in range(0, chunks, 65536):
            stop = min(first + 65536, chunks)
            keys_1cE = torch.randn(
                (1, stop - first, shape.width), generator=generator, device=device
            ).bfloat16()
            made = storing.stack(keys_1cE)
            stack.values_LCE[layer, first:stop] = made.values_LCE[0]
            if stack.scale_LCS is not None and made.scale_LCS is not None:
                stack.scale_LCS[layer, first:stop] = made.scale_LCS[0]
            if exact_LCE is not None:
                exact_LCE[layer, first:stop] = keys_1cE[0].cpu()
    part = Part(0, Spans.of(offsets_N1, device), stack, exact_LCE)
    return ResidentKeys(offsets_N1[:-1], offsets_N1[1:], (part,))


def some_questions(count: int, shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Reduced routing queries [Q, E]."""
    generator = torch.Generator(device).manual_seed(count)
    size = (shape.tokens, shape.width)
    return [torch.randn(size, generator=generator, device=device) for _ in range(count)]


def floor(rates: Rates, size: int, products: float, to: KeyFormat) -> float:
    """Seconds at least. size: bytes of keys; products: multiplications, of both parts."""
    rate = rates.floats if to is KeyFormat.FLOAT else rates.integers
    return max(size / rates.copied, 2 * products / rate)


def route_all(batch: Batch, rows: Rows, shape: Shape) -> torch.Tensor:
    """All layers, scores to the keys of the chosen documents, on the device."""
    fused = fused_available(batch.device)
    best = [
        kernels.best_keys(batch.plan, batch.score(layer, rows, fused=fused), shape.k, fused=fused)
        for layer in range(shape.layers)
    ]
    return torch.stack(best)


def bytes_of(memory: ResidentKeys) -> int:
    """Of its keys on the device."""
    return sum(part.keys.nbytes for part in memory.parts)


def one_memory(
    chunks: int, batches: Sequence[int], shape: Shape, to: KeyFormat, timing: Timing, rates: Rates
) -> list[dict[str, object]]:
    """One memory, batches of questions over it."""
    memory = some_memory(chunks, shape, KeyStorage(to, shape.group), timing.device)
    size = bytes_of(memory)
    results: list[dict[str, object]] = []
    for count in batches:
        batch = Batch.of([memory], [count])
        questions = some_questions(count, shape, timing.device)
        rows = Rows.of(questions, batch.first)
        seconds = timing.seconds(lambda: route_all(batch, rows, shape))  # noqa: B023  # called here
        products = 2.0 * count * shape.tokens * chunks * shape.width * shape.layers
        least = floor(rates, size, products, to)
        results.append(
            {
                "tokens": chunks * POOL_TOKENS,
                "format": to.value,
                "questions": count,
                "key_gb": round(size / 1e9, 2),
                "ms": round(seconds * 1000, 3),
                "ms_per_layer": round(seconds * 1000 / shape.layers, 4),
                "floor": "bytes" if least == size / rates.copied else "products",
                "over_floor": round(seconds / least, 3),
            }
        )
    return results


def many_memories(
    memories: int, chunks: int, asked: int, shape: Shape, timing: Timing, rates: Rates
) -> dict[str, object]:
    """`asked` of `memories` small memories, one question over each, all layers."""
    device = timing.device
    storing = KeyStorage(group=shape.group)
    held = [some_memory(chunks, shape, storing, device, seed) for seed in range(memories)]
    chosen = [int(i) for i in np.random.default_rng(1).choice(memories, asked, replace=False)]
    questions = some_questions(asked, shape, device)
    together = Batch.of([held[index] for index in chosen], [1] * asked)
    rows = Rows.of(questions, together.first)
    seconds = timing.seconds(lambda: route_all(together, rows, shape))
    alone = [
        (Batch.of([held[index]], [1]), Rows.of([question], together.first))
        for index, question in zip(chosen, questions, strict=True)
    ]

    def one_by_one() -> None:
        for batch, its_rows in alone:
            route_all(batch, its_rows, shape)

    apart = timing.seconds(one_by_one)
    size = sum(bytes_of(held[index]) for index in chosen)
    return {
        "memories": memories,
        "tokens_each": chunks * POOL_TOKENS,
        "questions": asked,
        "ms_per_layer": round(seconds * 1000 / shape.layers, 4),
        "over_floor": round(seconds * rates.copied / size, 3),
        "one_by_one_over_together": round(apart / seconds, 2),
    }


def small_device(chunks: int, shape: Shape, timing: Timing) -> dict[str, object]:
    """Two stages: 4 bits on the device, exact keys in host RAM. From routing queries to chosen
    documents on the host, as the engine does it, layers choosing together and each for itself."""
    device = timing.device
    _release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    storing = KeyStorage(KeyFormat.INT4, shape.group, exact=True)
    memory = some_memory(chunks, shape, storing, device)
    msa = replace(ONE_LAYER, routed_layers=tuple(range(shape.layers)))
    query_THD = torch.randn(shape.tokens, HEADS, HEAD_DIM, device=device).bfloat16()
    found: dict[str, object] = {"chunks": chunks, "key_gb": round(bytes_of(memory) / 1e9, 2)}
    for together in (True, False):

        def work() -> None:
            asked = [Asked(0, memory, range(shape.tokens), shape.k)]
            one = KernelPass(asked, msa, together=together, fused=fused_available(device))  # noqa: B023
            for layer in range(shape.layers):
                one.route(layer, query_THD, KV_HEADS)
            if together:  # noqa: B023  # called here
                one.choose_together()

        found["ms_together" if together else "ms_each"] = round(timing.seconds(work) * 1000, 2)
    found["peak_gb"] = _peak()
    return found


def against_formula(chunks: int, shape: Shape, timing: Timing) -> dict[str, object]:
    """One layer in bf16 by the published reference's formula and by the straightforward one, and by
    the kernels in each format; speed-ups over both."""
    device = timing.device
    memory = make_memory(chunks, torch.bfloat16, device, seed=0)
    q_THD = torch.randn(shape.tokens, HEADS, HEAD_DIM, device=device)
    votes_T = torch.ones(shape.tokens, dtype=torch.bool)
    coarse_THD, voting_T = q_THD.bfloat16(), votes_T.to(device)
    plain = timing.seconds(lambda: straightforward(coarse_THD, memory.keys_CE, memory))
    first = timing.seconds(lambda: reference(coarse_THD, memory.keys_CE, voting_T, memory))
    query = prepare(q_THD, votes_T, KV_HEADS, ONE_LAYER, k=TOP_K)
    assert query is not None and query.reduced_QE is not None
    _release()
    exact_N = straightforward(q_THD, memory.keys_CE.float(), memory)
    exact = kernels.best(exact_N[None], TOP_K)
    found: dict[str, object] = {
        "chunks": chunks,
        "reference_ms": round(first * 1000, 2),
        "straightforward_ms": round(plain * 1000, 2),
    }
    one = replace(shape, layers=1)
    for to in KeyFormat:
        storing = KeyStorage(to, shape.group)
        keys_LCE = memory.keys_CE[None]
        resident = ResidentKeys.of(memory.chunk_offsets_N1, keys_LCE, storing, device)
        batch = Batch.of([resident], [1])
        rows = Rows.of([query.reduced_QE], batch.first)
        ours = timing.seconds(lambda: route_all(batch, rows, one))  # noqa: B023  # called here
        ((places, _),) = kernels.read_keys(route_all(batch, rows, one)[0])
        same = set(places.tolist()) & set(exact.documents_BK[0].tolist())
        found[to.value] = {
            "over_reference": round(first / ours, 1),
            "over_straightforward": round(plain / ours, 1),
            "agreement": len(same) / TOP_K,
        }
    return found


def run(repeats: int, max_chunks: int) -> dict[str, object]:
    """Everything that fits: 1M, 10M and 100M tokens (max_chunks: the largest memory's). Two
    stages need its exact keys in host RAM: 58 GB at 100M tokens."""
    device, shape = torch.device("cuda"), Shape()
    timing = Timing(device, repeats)
    rates = Rates.of(timing)
    _release()
    formula = against_formula(max_chunks, shape, timing)
    _release()
    sizes = [chunks for chunks in (15_625, 156_250, 1_562_500) if chunks <= max_chunks]
    results: list[dict[str, object]] = []
    for to in KeyFormat:
        for chunks in sizes:
            torch.cuda.reset_peak_memory_stats()
            found = one_memory(chunks, (1, 8, 64), shape, to, timing, rates)
            results += [{**row, "peak_gb": _peak()} for row in found]
            _release()
    return {
        "card": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(rates.copied / 1e12, 3),
        "matrix_tflops": round(rates.floats / 1e12),
        "matrix_int8_tops": round(rates.integers / 1e12),
        "against_formula": formula,
        "one_memory": results,
        "many_memories": many_memories(1000, 781, 64, shape, timing, rates),
        "two_stage": small_device(max_chunks, shape, timing),
    }


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak() -> float:
    if not torch.cuda.is_available():
        return 0.0
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)
