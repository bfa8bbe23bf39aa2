"""What coarse routing keys lose: recall of the exact top 16, on real keys and questions.

    python -m benchmarks.precision --bank locomo_turns --data DIR --scopes 2 --limit 80 --json

Documents of a bank (docs/quality.md) are encoded by the model; its questions' own routing
queries are scored against keys in every precision. `each` is the mean over questions and
routed layers of the share of the exact 16 that the coarse keys find too, `together` the same of the
one choice by the mean over layers. Exact are scores of the keys as they are stored.
The gates: 0.995 for int8, 0.99 for two stages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.machine import machine
from benchmarks.quality import banks
from model_adapter.engine import DocumentText
from model_adapter.engines import choose_device
from model_adapter.msa import routed_text
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.forward import run
from model_adapter.msa.kernel_pass import Asked, KernelPass, voters_of
from model_adapter.msa.kernels import KeyFormat, KeyStorage, ResidentKeys
from model_adapter.msa.kernels.score import fused_available
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.routing import Positions
from storage.paths import DataFolder

TOP_K = 16
FORMATS = ("float", "int8", "int4", "two-stage")


def storage(name: str, head_dim: int) -> KeyStorage:
    """By the name that a worker's --routing-keys takes."""
    if name == "two-stage":
        return KeyStorage(KeyFormat.INT4, head_dim, exact=True)
    return KeyStorage(KeyFormat(name), head_dim)


def routing_queries(
    engine: MsaEngine, question: str, view: InMemoryView
) -> tuple[dict[int, torch.Tensor], list[int]]:
    """[T, H, D] by routed layer, as exact routing makes them, and the tokens that vote."""
    found: dict[int, torch.Tensor] = {}

    def see(name: str, value: torch.Tensor) -> None:
        if name.startswith("routing_query"):
            found[int(name.removeprefix("routing_query"))] = value.clone()

    segment = routed_text.routing_segment(engine._model, question, view, TOP_K)
    assert segment.routing is not None
    run(engine._model.decoder, [segment], only_routing=True, probe=see)
    msa = engine._model.decoder.config.msa
    return found, voters_of(segment.routing.votes, 0, None, msa)


def choices(
    resident: ResidentKeys,
    queries: Mapping[int, torch.Tensor],
    voters: Sequence[int],
    engine: MsaEngine,
    *,
    together: bool,
) -> list[Positions]:
    """Of every layer, or the one of all."""
    config = engine._model.decoder.config
    fused = fused_available(engine._model.decoder.device)
    asked = [Asked(0, resident, voters, TOP_K)]
    one = KernelPass(asked, config.msa, together=together, fused=fused)
    for layer, query_THD in queries.items():
        one.route(layer, query_THD, config.num_kv_heads)
    if together:
        one.choose_together()
        return [next(iter(one.asked[0].chosen.values()))]
    return list(one.asked[0].chosen.values())


def share(ours: Sequence[Positions], exact: Sequence[Positions]) -> float:
    """Of the exact choices, that ours have too."""
    found = [len(set(a) & set(b)) / len(b) for a, b in zip(ours, exact, strict=True)]
    return float(np.mean(found))


def compare(engine: MsaEngine, scope: banks.Scope) -> dict[str, dict[str, list[float]]]:
    """Shares of each question by precision, each and together."""
    texts = scope.texts()
    blocks = engine.encode([DocumentText(n, text) for n, text in texts.items()]).blocks
    layout, device = engine.description.layout, engine._model.decoder.device
    held = {}
    for name in FORMATS:
        storing = storage(name, layout.head_dim)
        held[name] = InMemoryView(layout, blocks, texts, storing=storing, device=device)
    found: dict[str, dict[str, list[float]]] = {
        name: {"each": [], "together": []} for name in FORMATS[1:]
    }
    for question in scope.questions:
        queries, voters = routing_queries(engine, question.text, held["float"])
        for kind in ("each", "together"):
            chosen = {}
            for name, view in held.items():
                resident = view.resident_keys()
                assert resident is not None
                chosen[name] = choices(
                    resident, queries, voters, engine, together=kind == "together"
                )
            for name in found:
                found[name][kind].append(share(chosen[name], chosen["float"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bank", required=True)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--model", default="default")
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=0, help="questions, 0: all")
    parser.add_argument("--scopes", type=int, default=0, help="conversations, 0: all")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    bank = banks.read(
        arguments.bank, arguments.data, limit=arguments.limit, scopes=arguments.scopes
    )
    device = choose_device(arguments.device)
    shares: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        folder = DataFolder(arguments.data_dir)
        model = models.load(arguments.model, folder, "auto", device, arguments.adapter)
        engine = MsaEngine(model, str(device))
        for scope in bank.scopes.values():
            for name, kinds in compare(engine, scope).items():
                for kind, values in kinds.items():
                    shares.setdefault(name, {}).setdefault(kind, []).extend(values)
    found = {
        "machine": machine(),
        "bank": bank.name,
        "documents": bank.documents,
        "questions": len(bank.questions),
        "recall_at_16": {
            name: {kind: round(float(np.mean(values)), 4) for kind, values in kinds.items()}
            for name, kinds in shares.items()
        },
    }
    print(json.dumps(found) if arguments.json else found)


if __name__ == "__main__":
    main()
