"""A rank of a memory over several processes: python -m tests.support.shard_rank RANK RANKS FILE.

Reads cases as JSON lines, routes each together with the other ranks and writes what it chose.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch import distributed

from model_adapter.engine import CitationEvent, DocumentText, Generate, RoutingEvent, TextEvent
from model_adapter.msa.boards import DeviceBoard
from model_adapter.msa.config import LayerChoice, MsaConfig
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingChoice
from model_adapter.msa.kernel_pass import Asked, KernelPass
from model_adapter.msa.kernels import Kernels, KeyFormat, KeyStorage, ResidentKeys, Shard
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.shard_view import ShardView
from tests.support.tiny_msa import TEXTS, finish, tiny_model

LAYERS = 2
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CPU = torch.device("cpu")


def route(case: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Chosen positions and combined scores of every row. One rank holds everything.

    Keys and questions are small integers, so that products are exact and ties many.
    """
    msa = MsaConfig(tuple(range(LAYERS)), aux_loss_method="INFONCE_DECOUPLE")
    generator = torch.Generator().manual_seed(case["seed"])
    asked, token = list[Asked](), 0
    storing = KeyStorage(KeyFormat.INT4, HEAD_DIM, exact=True) if case["exact"] else KeyStorage()
    for place, (counts, rows) in enumerate(zip(case["counts"], case["rows"], strict=True)):
        offsets_N1 = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        keys_LCE = _integers((LAYERS, int(offsets_N1[-1]), KV_HEADS * HEAD_DIM), generator)
        shard = Shard.of(offsets_N1, rank, ranks) if ranks > 1 else None
        if shard is not None:
            first, stop = shard.own
            keys_LCE = keys_LCE[:, int(offsets_N1[first]) : int(offsets_N1[stop])]
            offsets_N1 = offsets_N1[first : stop + 1] - offsets_N1[first]
        whole = ResidentKeys.of(offsets_N1, keys_LCE, storing, CPU)
        resident = ResidentKeys(whole.firsts_N, whole.ends_N, whole.parts, shard)
        for _ in range(rows):
            voters = list(range(token, token + 3))
            asked.append(Asked(10 * place + len(asked), resident, voters, case["k"]))
            token += 3
    together = case["together"]
    one = KernelPass(asked, msa, together=together, fused=False)
    for layer in range(LAYERS):
        one.route(layer, _integers((token, HEADS, HEAD_DIM), generator), KV_HEADS)
    if together:
        one.choose_together()
    boards: list[DeviceBoard] = one.boards()
    return {
        "chosen": [[item.chosen[layer].tolist() for layer in range(LAYERS)] for item in one.asked],
        "best": [board.best(5).tolist() for board in boards],
        "scores": [board.at(board.best(5)).tolist() for board in boards],
    }


def answer(case: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """What the tiny engine says over the sharded memory."""
    choice = LayerChoice(case["choice"])
    model = tiny_model(top_k=2, layer_choice=choice)
    engine = MsaEngine(model, routing=RoutingChoice(Kernels.TWIN, None, ""))
    layout = engine.description.layout
    blocks = engine.encode([DocumentText(n, text) for n, text in TEXTS.items()]).blocks
    view: Any = InMemoryView(layout, blocks, TEXTS, storing=KeyStorage())
    if ranks > 1:
        shard = Shard.of(view.chunk_offsets_N1, rank, ranks)
        numbers = view.numbers_N[slice(*shard.own)]
        own = [block for block in blocks if block.number in numbers]
        part = InMemoryView(layout, own, TEXTS, storing=KeyStorage())
        resident = part.resident_keys()
        assert resident is not None
        view = ShardView(part, resident, shard, view.numbers_N, view.chunk_offsets_N1)
    events = finish(engine, engine.start(Generate(case["question"], 8), view))[0]
    return {
        "text": "".join(event.text for event in events if isinstance(event, TextEvent)),
        "cited": [event.number for event in events if isinstance(event, CitationEvent)],
        "ranked": [
            [document.number, *[[one.layer, one.rank] for one in document.layers]]
            for event in events
            if isinstance(event, RoutingEvent)
            for document in event.documents
        ],
    }


def _integers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=generator).float()


def main() -> None:
    rank, ranks, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=ranks)
    with torch.inference_mode():
        for line in sys.stdin:
            case = json.loads(line)
            found = answer(case, rank, ranks) if "choice" in case else route(case, rank, ranks)
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
