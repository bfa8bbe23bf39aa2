"""Encoding: tokens a second, against the bare forward and against what the processor multiplies.

    python -m benchmarks.encode --device cuda --model random:4b --json

The engine encodes `--documents` documents of mixed lengths. `bare` is the same decoder run over
the same tokens, packed the same way, with nothing pooled, copied to the host or made into
blocks. `share_of_bare` is encoding's tokens a second over that. `tflops` counts the products
of weights and tokens of the layers that are run, and attention's; `share_of_matmul` is it over
what a square product of the same type reaches in this run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.machine import machine
from model_adapter.engine import DocumentText
from model_adapter.engines import choose_device
from model_adapter.msa.config import ModelConfig
from model_adapter.msa.encode import TokenisedDocument, batches, packed_batches, packs
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.model import Decoder
from model_adapter.msa.packed import PackedRows, run_layers
from storage.paths import DataFolder


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP a second of a square product of random values."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 5)


def flops(c: ModelConfig, lengths: list[int]) -> float:
    """Of encoding documents of so many tokens: the layers up to the last routed one, whose own
    attention and MLP are not run, causal attention within each document."""
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    whole = c.msa.routed_layers[-1]
    projected = c.hidden_size * (wide + 2 * narrow)
    finished = c.hidden_size * (wide + 3 * c.intermediate_size)
    routed = len(c.msa.routed_layers) * c.hidden_size * narrow if c.msa.decouple_router else 0
    weights = (whole + 1) * projected + whole * finished + routed
    attended = whole * 2 * wide * sum(length * (length + 1) / 2 for length in lengths)
    return 2.0 * (weights * sum(lengths) + attended)


def bare(decoder: Decoder, documents: list[TokenisedDocument]) -> None:
    """The forward alone, up to the last routed layer, which encoding only projects."""
    layers = range(decoder.config.msa.routed_layers[-1])
    for batch in packed_batches(documents) if packs(decoder) else batches(documents):
        rows = PackedRows([len(one.ids) for one in batch], decoder.device, varlen=packs(decoder))
        ids_T = torch.tensor([token for one in batch for token in one.ids])
        run_layers(decoder, rows, decoder.embed(ids_T.to(decoder.device)), layers)


def texts(tokens: int, documents: int) -> list[str]:
    """Letters: documents of a quarter to twice `tokens` of them."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(tokens // 4, 2 * tokens, size=documents)
    words = ("river ", "old ", "bridge ", "harbour ")
    return ["".join(rng.choice(words, size=length // 6 + 1)) for length in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default", help="as a worker's, or random:SHAPE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--letters", type=int, default=600, help="of a document, on average")
    parser.add_argument("--matmul", type=int, default=0, help="size; 0: 8192, on a CPU 1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    with torch.inference_mode():
        folder = DataFolder(arguments.data_dir)
        model = models.load(arguments.model, folder, arguments.dtype, device)
        config = model.config
        engine = MsaEngine(model, str(device))
        decoder, prompts = engine._model.decoder, engine._model.prompts
        documents = [
            DocumentText(n, text)
            for n, text in enumerate(texts(arguments.letters, arguments.documents), 1)
        ]
        tokenised = [
            TokenisedDocument(one.number, prompts.document(one.number, one.text))
            for one in documents
        ]
        lengths = [len(one.ids) for one in tokenised]
        encoding = seconds(lambda: engine.encode(documents), device, arguments.repeats)
        alone = seconds(lambda: bare(decoder, tokenised), device, arguments.repeats)
        size = arguments.matmul or (8192 if device.type == "cuda" else 1024)
        rate = matmul_rate(decoder.dtype, device, size)
    work = flops(config, lengths)
    found: dict[str, object] = {
        "model": arguments.model,
        "machine": machine(),
        "tokens": sum(lengths),
        "tokens_per_s": round(sum(lengths) / encoding, 1),
        "bare_tokens_per_s": round(sum(lengths) / alone, 1),
        "share_of_bare": round(alone / encoding, 3),
        "tflops": round(work / encoding / 1e12, 3),
        "matmul_tflops": round(rate / 1e12, 3),
        "share_of_matmul": round(work / encoding / rate, 3),
        "bare_share_of_matmul": round(work / alone / rate, 3),
    }
    print(json.dumps(found) if arguments.json else found)


if __name__ == "__main__":
    main()
