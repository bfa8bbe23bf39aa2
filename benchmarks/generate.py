"""Answers a second and time to first token, by how many queries run at once.

    python -m benchmarks.generate --device cuda --model random:4b --concurrent 1 8 32 128 --json

One engine over one memory in RAM, in this process: nothing of gRPC or LMDB is in it. For each
number of queries at once, `tokens_per_s` counts the answers' tokens from the first query's
start to the last one's end; every answer has the same number of tokens. A query starts as
another ends (`--waves` times the number at once in all), so time to first token (`ttft_ms`)
is that under load, routing and prefill of others included. `over_one_by_one` compares with
the run at 1. `plain` is the same base in transformers, given prompts of the same length, in
one batch; left out where transformers is not installed, or with `--no-plain`.

`--profile` adds where the time of one more wave goes: milliseconds by phase, and how often each
was gone through. `routing` scores and chooses documents, `fetch` brings their content, `rows`
gives rows room, `prefill` is what else passes over prompts take, `decode` the steps of a token,
`host` all outside of passes (texts, tokens, rankings). The device is waited for between phases.

Every line is printed as soon as it is known. `--seconds` bounds all of it: what runs then is cut
(`cut`; its figures are of what was done), the rest is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.machine import machine
from benchmarks.plain import Plain
from benchmarks.workload import conversation
from model_adapter.engine import CitationEvent, DocumentText, Generate, Generation
from model_adapter.engines import choose_device
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.decode_step import Way
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingKeyChoice, choose
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.phases import Phases, unmeasured
from storage.paths import DataFolder

QUESTIONS = ("What did Mara repair in Lisbon?", "Which thing did Emil lose?", "Who has a beehive?")

#: Of every answer of a profile: enough to see what a step of decoding takes.
_PROFILED_TOKENS = 16


@dataclass
class Load:
    """What a run gave. Seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    cut: bool = False

    def figures(self) -> dict[str, float]:
        """Rounded."""
        found = {"tokens_per_s": round(self.tokens / self.seconds, 1)}
        if self.first_s:
            p50, p99 = np.percentile(self.first_s, (50, 99)) * 1000
            found |= {"ttft_p50_ms": round(p50, 2), "ttft_p99_ms": round(p99, 2)}
        return found | ({"cut": True} if self.cut else {})


def remembered(engine: MsaEngine, documents: int, device: torch.device) -> InMemoryView:
    """A memory of generated turns."""
    lines = islice(conversation(5, documents), documents)
    texts = {n: f"{line.speaker}: {line.text}" for n, line in enumerate(lines, 1)}
    encoded = engine.encode([DocumentText(n, text) for n, text in texts.items()])
    own = engine.description
    return InMemoryView(own.layout, encoded.blocks, texts, storing=own.storing, device=device)


def run(
    engine: MsaEngine,
    view: InMemoryView,
    at_once: int,
    total: int,
    tokens: int,
    *,
    until: float = math.inf,
) -> Load:
    """`total` queries, `at_once` of them at a time, each answered with `tokens` tokens.

    until: of time.perf_counter, when it is cut.
    """
    load, running = Load(), dict[int, tuple[Generation, float]]()
    started = time.perf_counter()
    asked = 0
    while asked < total or running:
        load.cut = time.perf_counter() > until
        if load.cut:
            load.tokens += sum(one.counts.answer_tokens for one, _ in running.values())
            break
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
    assert load.cut or len(load.first_s) == total
    return load


def profile(engine: MsaEngine, view: InMemoryView, at_once: int, tokens: int) -> dict[str, object]:
    """Where the time of one wave of queries goes."""
    decoder = engine._model.decoder
    phases = Phases(decoder.device)
    decoder.phase = phases
    try:
        with phases("host"):
            run(engine, view, at_once, at_once, tokens)
    finally:
        decoder.phase = unmeasured
    took = {name: round(seconds * 1000, 2) for name, seconds in phases.seconds.items()}
    return {"at_once": at_once, "profile_ms": took, "turns": dict(phases.turns)}


def prompts(engine: MsaEngine, view: InMemoryView, count: int) -> list[list[int]]:
    """As long as those of the run: three documents before a question."""
    builder = engine._model.prompts
    cited = [builder.cited(int(n), view.text(int(n))) for n in view.numbers_N[:3]]
    return [builder.chat(cited, f"{QUESTIONS[n % len(QUESTIONS)]} ({n})") for n in range(count)]


def compare(
    model: LoadedModel, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """One row for each number at once; what is found out about it is printed at once."""
    until = time.perf_counter() + (arguments.seconds or math.inf)
    has_plain = arguments.plain and importlib.util.find_spec("transformers") is not None
    plain = Plain(model, device) if has_plain else None
    keys = RoutingKeyChoice(arguments.routing_keys)
    routing = choose(keys, model.config, model.compute_dtype, device)
    way = Way[arguments.way.upper()] if arguments.way != "auto" else None
    engine = MsaEngine(model, str(device), routing=routing, pooled=way)
    tell({"placement": engine.description.placement})
    view = remembered(engine, arguments.documents, device)
    run(engine, view, 2, 2, 4)
    rows = dict[int, dict[str, object]]()
    rates = dict[int, float]()
    for at_once in arguments.concurrent:
        if time.perf_counter() > until:
            break
        run(engine, view, at_once, at_once, 4, until=until)  # captures what will be replayed
        total = at_once * arguments.waves
        figures = run(engine, view, at_once, total, arguments.tokens, until=until).figures()
        rates[at_once] = figures["tokens_per_s"]
        rows[at_once] = {"at_once": at_once, **figures}
        if 1 in rates:
            rows[at_once]["over_one_by_one"] = round(rates[at_once] / max(rates[1], 0.1), 2)
        tell(rows[at_once])
        if arguments.profile and time.perf_counter() < until:
            found = profile(engine, view, at_once, _PROFILED_TOKENS)
            rows[at_once] |= found
            tell(found)
    for at_once, row in rows.items():
        if plain is None or time.perf_counter() > until:
            break
        asked = prompts(engine, view, at_once)
        plain.tokens_per_s(asked, 4)
        rate = plain.tokens_per_s(asked, arguments.tokens)
        over = {"over_plain": round(rates[at_once] / rate, 2)}
        row |= {"plain_tokens_per_s": round(rate, 1), **over}
        tell({"at_once": at_once, **over})
    return list(rows.values())


def tell(row: Mapping[str, object]) -> None:
    """Prints a line of JSON."""
    print(json.dumps(row), flush=True)


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
    parser.add_argument("--profile", action="store_true", help="where the time goes, too")
    parser.add_argument("--seconds", type=float, default=0, help="in all, 0 for no bound")
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
        tell({**found, "results": rows})


if __name__ == "__main__":
    main()
