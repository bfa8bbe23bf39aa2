"""Answers a second and time to first token, by how many queries run at once.

    python -m benchmarks.generate --device cuda --model random:4b --concurrent 1 8 32 128 --json

One engine over one memory in RAM, in this process: nothing of gRPC or LMDB is in it. For each
number of queries at once, `tokens_per_s` counts the answers' tokens from the first query's
start to the last one's end; every answer has the same number of tokens. A query starts as
another ends (`--waves` times the number at once in all), so time to first token (`ttft_ms`)
is that under load, routing and prefill of others included. `over_one_by_one` compares with
the run at 1. `plain` is the same base in transformers, given prompts of the same length, in
one batch; left out where transformers is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.machine import machine
from benchmarks.workload import conversation
from model_adapter.engine import CitationEvent, DocumentText, Generate, Generation
from model_adapter.engines import choose_device
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.decode_step import Way
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingKeyChoice, choose
from model_adapter.msa.memory import InMemoryView
from storage.paths import DataFolder

QUESTIONS = ("What did Mara repair in Lisbon?", "Which thing did Emil lose?", "Who has a beehive?")


@dataclass
class Load:
    """What a run gave. Seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Rounded."""
        p50, p99 = np.percentile(self.first_s, (50, 99)) * 1000
        rate = round(self.tokens / self.seconds, 1)
        return {"tokens_per_s": rate, "ttft_p50_ms": round(p50, 2), "ttft_p99_ms": round(p99, 2)}


def remembered(engine: MsaEngine, documents: int, device: torch.device) -> InMemoryView:
    """A memory of generated turns."""
    lines = islice(conversation(5, documents), documents)
    texts = {n: f"{line.speaker}: {line.text}" for n, line in enumerate(lines, 1)}
    encoded = engine.encode([DocumentText(n, text) for n, text in texts.items()])
    own = engine.description
    return InMemoryView(own.layout, encoded.blocks, texts, storing=own.storing, device=device)


def run(engine: MsaEngine, view: InMemoryView, at_once: int, total: int, tokens: int) -> Load:
    """`total` queries, `at_once` of them at a time, each answered with `tokens` tokens."""
    load, running = Load(), dict[int, tuple[Generation, float]]()
    started = time.perf_counter()
    asked = 0
    while asked < total or running:
        while asked < total and len(running) < at_once:
            request = Generate(f"{QUESTIONS[asked % len(QUESTIONS)]} ({asked})", tokens)
            running[asked] = engine.start(request, view), time.perf_counter()
            asked += 1
        results = engine.step([generation for generation, _ in running.values()])
        now = time.perf_counter()
        for (number, (generation, began)), result in zip(
            list(running.items()), results, strict=True
        ):
            assert result.error is None
            if generation.counts.answer_tokens == 1 and not any(
                isinstance(event, CitationEvent) for event in result.events
            ):
                load.first_s.append(now - began)
            if generation.done:
                load.tokens += generation.counts.answer_tokens
                del running[number]
    load.seconds = time.perf_counter() - started
    assert len(load.first_s) == total
    return load


class Plain:
    """The same base in transformers. weights: taken before an engine takes them."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        import transformers  # noqa: PLC0415  # optional

        c = model.config
        kind = "Qwen3" if c.qk_norm else "Llama"
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_positions,
            tie_word_embeddings=c.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
        dtype = torch.bfloat16 if model.compute_dtype == "bf16" else torch.float32
        self._device = device
        self._model = getattr(transformers, f"{kind}ForCausalLM")(config).to(device, dtype)
        own = {name: value for name, value in model.weights.items() if "router" not in name}
        missing, unexpected = self._model.load_state_dict(own, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self._model.tie_weights()
        self._model.eval()

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Of greedy answers to all prompts in one left-padded batch."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        started = time.perf_counter()
        made = self._model.generate(input_ids=ids, attention_mask=mask, **exactly)
        made.cpu()
        return float(len(prompts) * tokens / (time.perf_counter() - started))


def prompts(engine: MsaEngine, view: InMemoryView, count: int) -> list[list[int]]:
    """As long as those of the run: three documents before a question."""
    builder = engine._model.prompts
    cited = [builder.cited(int(n), view.text(int(n))) for n in view.numbers_N[:3]]
    return [builder.chat(cited, f"{QUESTIONS[n % len(QUESTIONS)]} ({n})") for n in range(count)]


def compare(
    model: LoadedModel, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """One row for each number at once."""
    has_plain = arguments.plain and importlib.util.find_spec("transformers") is not None
    plain = Plain(model, device) if has_plain else None
    keys = RoutingKeyChoice(arguments.routing_keys)
    routing = choose(keys, model.config, model.compute_dtype, device)
    way = Way[arguments.way.upper()] if arguments.way != "auto" else None
    engine = MsaEngine(model, str(device), routing=routing, pooled=way)
    print(json.dumps({"placement": engine.description.placement}), flush=True)
    view = remembered(engine, arguments.documents, device)
    run(engine, view, 2, 2, 4)
    rows: list[dict[str, object]] = []
    alone = 0.0
    for at_once in arguments.concurrent:
        run(engine, view, at_once, at_once, 4)  # warms up: captures what will be replayed
        figures = run(engine, view, at_once, at_once * arguments.waves, arguments.tokens).figures()
        alone = alone or figures["tokens_per_s"]
        row: dict[str, object] = {"at_once": at_once, **figures}
        if arguments.concurrent[0] == 1:
            row["over_one_by_one"] = round(figures["tokens_per_s"] / alone, 2)
        if plain is not None:
            asked = prompts(engine, view, at_once)
            plain.tokens_per_s(asked, 4)
            rate = plain.tokens_per_s(asked, arguments.tokens)
            row["plain_tokens_per_s"] = round(rate, 1)
            row["over_plain"] = round(figures["tokens_per_s"] / rate, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default", help="as a worker's, or random:SHAPE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--way", default="auto", choices=("auto", "graphs", "flash", "padded"))
    parser.add_argument("--routing-keys", default="auto", choices=list(RoutingKeyChoice))
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument("--waves", type=int, default=2)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--no-plain", dest="plain", action="store_false")
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    with torch.inference_mode():
        model = models.load(
            arguments.model, DataFolder(arguments.data_dir), arguments.dtype, device
        )
        rows = compare(model, device, arguments)
    if arguments.json:
        held = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        found = {"model": arguments.model, "machine": machine(), "peak_gb": round(held / 1e9, 2)}
        print(json.dumps({**found, "results": rows}))


if __name__ == "__main__":
    main()
