"""Routing on a GPU: the fused kernels against the floor (bytes over bandwidth) and against
the straightforward formula. Run by `python -m benchmarks.routing --device cuda`.

Every figure is of one run on one machine. The shape is that of a 4B MSA model: 8 kv heads,
32 query heads, dim 128, 18 routed layers, 64 tokens a chunk; keys are random, documents
have 1 to 5 chunks. `over_floor` is the time of all layers over the bytes of their keys at
the measured copy bandwidth; choosing the documents is included.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.routing import HEAD_DIM, HEADS, KV_HEADS, TOP_K, make_memory, straightforward
from model_adapter.msa import kernels
from model_adapter.msa.config import MsaConfig
from model_adapter.msa.kernels import KeyFormat, Plan, RoutingKeys, Rows, Spans
from model_adapter.msa.kernels.plan import Offsets
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


@dataclass(frozen=True)
class Timing:
    """Seconds of a piece of work on the device, its launches included."""

    device: torch.device
    repeats: int

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of `repeats` runs after two to warm up."""
        for _ in range(2):
            work()
        times = []
        for _ in range(self.repeats):
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            work()
            torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def copy_bandwidth(timing: Timing, size: int = 4 << 30) -> float:
    """Bytes a second, read and written, of a plain copy on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=timing.device)
    target = torch.empty_like(source)
    return 2 * size / timing.seconds(lambda: target.copy_(source))


def some_offsets(chunks: int, seed: int) -> Offsets:
    """Documents of 1 to 5 chunks, 3 on average."""
    ends = np.cumsum(np.random.default_rng(seed).integers(1, 6, size=chunks))
    return np.concatenate(([0], ends[ends < chunks], [chunks])).astype(np.int64)


def some_keys(
    chunks: int, shape: Shape, to: KeyFormat, device: torch.device, seed: int
) -> RoutingKeys:
    """Random keys of one layer. Quantised piece by piece: the floats never lie there whole."""
    generator = torch.Generator(device).manual_seed(seed)
    pieces = []
    for first in range(0, chunks, 65536):
        count = min(65536, chunks - first)
        keys_CE = torch.randn(count, shape.width, generator=generator, device=device)
        pieces.append(kernels.quantise(keys_CE.bfloat16(), to, shape.group))
    scales = [piece.scale_CS for piece in pieces if piece.scale_CS is not None]
    values_CE = torch.cat([piece.values_CE for piece in pieces])
    return RoutingKeys(to, values_CE, torch.cat(scales) if scales else None, shape.group)


def some_questions(count: int, shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Reduced routing queries [Q, E]."""
    generator = torch.Generator(device).manual_seed(count)
    size = (shape.tokens, shape.width)
    return [torch.randn(size, generator=generator, device=device) for _ in range(count)]


def route_all(plan: Plan, layers: Sequence[Sequence[RoutingKeys]], rows: Rows, k: int) -> None:
    """All layers, scores to chosen documents. layers: keys of every memory, per layer."""
    for keys in layers:
        for scores_BN in plan.split(kernels.score(plan, keys, rows)):
            kernels.best(scores_BN, k)


def one_memory(
    chunks: int, batches: Sequence[int], shape: Shape, to: KeyFormat, timing: Timing, rate: float
) -> list[dict[str, object]]:
    """One memory, batches of questions over it."""
    spans = Spans.of(some_offsets(chunks, 0), timing.device)
    layers = [[some_keys(chunks, shape, to, timing.device, seed)] for seed in range(shape.layers)]
    size = sum(keys.nbytes for (keys,) in layers)
    results: list[dict[str, object]] = []
    for batch in batches:
        plan = Plan.of([spans], [batch])
        rows = Rows.of(some_questions(batch, shape, timing.device), layers[0][0])
        seconds = timing.seconds(lambda: route_all(plan, layers, rows, shape.k))  # noqa: B023  # called here
        results.append(
            {
                "tokens": chunks * POOL_TOKENS,
                "format": to.value,
                "questions": batch,
                "key_gb": round(size / 1e9, 2),
                "ms": round(seconds * 1000, 3),
                "ms_per_layer": round(seconds * 1000 / shape.layers, 4),
                "over_floor": round(seconds * rate / size, 3),
            }
        )
    return results


def many_memories(
    memories: int, chunks: int, asked: int, shape: Shape, timing: Timing, rate: float
) -> dict[str, object]:
    """`asked` of `memories` small memories, one question over each, in one launch a layer."""
    device = timing.device
    held = [some_keys(chunks, shape, KeyFormat.FLOAT, device, seed) for seed in range(memories)]
    chosen = [int(i) for i in np.random.default_rng(1).choice(memories, asked, replace=False)]
    spans = [Spans.of(some_offsets(chunks, index), device) for index in chosen]
    questions = some_questions(asked, shape, device)
    plan, rows = Plan.of(spans, [1] * asked), Rows.of(questions, held[0])
    keys = [held[index] for index in chosen]
    together = timing.seconds(lambda: kernels.score(plan, keys, rows))
    alone_plans = [Plan.of([item], [1]) for item in spans]
    alone_rows = [Rows.of([question], held[0]) for question in questions]

    def one_by_one() -> None:
        for item, its_plan, its_rows in zip(keys, alone_plans, alone_rows, strict=True):
            kernels.score(its_plan, [item], its_rows)

    apart = timing.seconds(one_by_one)
    size = sum(item.nbytes for item in keys)
    return {
        "memories": memories,
        "tokens_each": chunks * POOL_TOKENS,
        "questions": asked,
        "ms_per_layer": round(together * 1000, 4),
        "over_floor": round(together * rate / size, 3),
        "one_by_one_over_together": round(apart / together, 2),
    }


def against_formula(chunks: int, shape: Shape, timing: Timing) -> dict[str, object]:
    """One layer by the straightforward formula in bf16, and by the kernels in each format."""
    device = timing.device
    memory = make_memory(chunks, torch.bfloat16, device, seed=0)
    q_THD = torch.randn(shape.tokens, HEADS, HEAD_DIM, device=device)
    plain = timing.seconds(lambda: straightforward(q_THD.bfloat16(), memory.keys_CE, memory))
    query = prepare(q_THD, torch.ones(shape.tokens, dtype=torch.bool), KV_HEADS, ONE_LAYER, k=TOP_K)
    assert query is not None and query.reduced_QE is not None
    spans = Spans.of(memory.chunk_offsets_N1, device)
    plan = Plan.of([spans], [1])
    exact_N = straightforward(q_THD, memory.keys_CE.float(), memory)
    found: dict[str, object] = {"chunks": chunks, "straightforward_ms": round(plain * 1000, 2)}
    for to in KeyFormat:
        keys = kernels.quantise(memory.keys_CE, to, shape.group)
        rows = Rows.of([query.reduced_QE], keys)
        ours = timing.seconds(lambda: route_all(plan, [[keys]], rows, TOP_K))  # noqa: B023  # called here
        chosen = kernels.best(plan.split(kernels.score(plan, [keys], rows))[0], TOP_K)
        exact = kernels.best(exact_N[None], TOP_K)
        same = set(chosen.documents_BK[0].tolist()) & set(exact.documents_BK[0].tolist())
        found[to.value] = {"speedup": round(plain / ours, 1), "agreement": len(same) / TOP_K}
    return found


def run(repeats: int, max_chunks: int) -> dict[str, object]:
    """Everything that fits: 1M, 10M and 100M tokens (max_chunks: the largest memory's)."""
    device, shape = torch.device("cuda"), Shape()
    timing = Timing(device, repeats)
    rate = copy_bandwidth(timing)
    formula = against_formula(max_chunks, shape, timing)
    _release()
    sizes = [chunks for chunks in (15_625, 156_250, 1_562_500) if chunks <= max_chunks]
    results: list[dict[str, object]] = []
    for to in KeyFormat:
        for chunks in sizes:
            torch.cuda.reset_peak_memory_stats()
            found = one_memory(chunks, (1, 8, 64), shape, to, timing, rate)
            results += [{**row, "peak_gb": _peak()} for row in found]
            _release()
    return {
        "card": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(rate / 1e12, 3),
        "against_formula": formula,
        "one_memory": results,
        "many_memories": many_memories(1000, 781, 64, shape, timing, rate),
    }


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)
