"""A worker over one very large memory: first token, cold and resident, and peak memory.

    python -m benchmarks.endtoend --device cuda --model random:135m --tokens 100000000 --json

The memory's blocks lie in LMDB, in the model's layout: synthetic ones up to `--tokens` tokens
in documents of three chunks, and real ones of generated conversation behind them. The worker
(its gRPC server on a unix socket, pager, scheduler and engine, in this process) answers
questions over it: the first pages everything in. Disk: three times the routing keys' size,
or 27 GB for the default model's shape and 100M tokens. Nothing is encrypted here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from grpc import aio

from benchmarks import models
from benchmarks.generate import QUESTIONS
from benchmarks.machine import machine
from benchmarks.workload import conversation
from model_adapter.engine import DocumentText
from model_adapter.engines import choose_device
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingKeyChoice, choose
from model_adapter.pager import Budgets
from model_adapter.placement import routing_budget
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceStub
from model_adapter.worker import WorkerConfig, serving
from storage.documents import TextSource
from storage.layout import KVBlock
from storage.lmdb_store import LmdbStore
from storage.paths import DataFolder
from storage.store import EncodingId, MemoryUid, StoredDocument

if TYPE_CHECKING:  # A name that only the type stub knows.
    from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceAsyncStub

TENANT, MEMORY = "0a" * 16, "0b" * 16
UID = MemoryUid(bytes.fromhex(MEMORY))
CHUNKS_EACH, REAL, BATCH = 3, 50, 64


@dataclass(frozen=True)
class Asked:
    """One question's times in milliseconds: first_token as its client sees it, the others as
    the worker tells them."""

    first_token: float
    page_in: float
    routing: float
    routed_chunks: int


def fill(store: LmdbStore, engine: MsaEngine, tokens: int) -> int:
    """Writes blocks and texts; the last document's number."""
    layout, own = engine.description.layout, engine.description.identity
    encoding = EncodingId(bytes.fromhex(own)[:16])
    each = CHUNKS_EACH * layout.pool_tokens
    synthetic = tokens // each
    rng = np.random.default_rng(1)
    shape = (len(layout.routed_layers), CHUNKS_EACH, layout.width)
    for first in range(1, synthetic + 1, BATCH):
        values = rng.standard_normal((3, *shape), np.float32)
        bits = values.view(np.uint32) >> 16
        routing, key, value = bits.astype(np.uint16) if layout.dtype == "bf16" else values
        numbers = range(first, min(first + BATCH, synthetic + 1))
        store.put_documents(
            UID, [StoredDocument(n, n, 0, TextSource(f"note {n}")) for n in numbers]
        )
        content = key if layout.separate_routing_keys else None
        blocks = [KVBlock(number, each, routing, content, value) for number in numbers]
        store.put_blocks(UID, encoding, layout, blocks)
    lines = islice(conversation(5, REAL), REAL)
    texts = {n: line.text for n, line in enumerate(lines, synthetic + 1)}
    store.put_documents(UID, [StoredDocument(n, n, 0, TextSource(t)) for n, t in texts.items()])
    real = engine.encode([DocumentText(n, text) for n, text in texts.items()]).blocks
    store.put_blocks(UID, encoding, layout, sorted(real, key=lambda block: block.number))
    return synthetic + REAL


async def ask(stub: ModelAdapterServiceAsyncStub, ref: pb.MemoryRef, question: str) -> Asked:
    """An answer of one token, which ends with it."""
    began = time.perf_counter()
    request = pb.QueryRequest(memory=ref, question=question, max_answer_tokens=1)
    async for event in stub.Query(request):
        last = event
    done, taken = last.finished, time.perf_counter() - began
    return Asked(taken * 1000, done.page_in_ms, done.routing_ms, done.routed_chunks)


async def serve(
    root: Path, engine: MsaEngine, budgets: Budgets, last: int, repeats: int
) -> dict[str, object]:
    """Questions to a worker: the first one is cold."""
    device = torch.device(engine.description.device)
    config = WorkerConfig(f"unix:{root}/w.sock", DataFolder(root), budgets)
    ref = pb.MemoryRef(
        tenant=TENANT,
        memory_uid=MEMORY,
        last_number=last,
        identity=engine.description.identity,
    )
    async with (
        serving(engine, device, config, lambda: None) as address,
        aio.insecure_channel(address) as channel,
    ):
        stub = ModelAdapterServiceStub(channel)
        cold = await ask(stub, ref, QUESTIONS[0])
        resident = [await ask(stub, ref, QUESTIONS[n % 3]) for n in range(repeats)]
        began = time.perf_counter()
        await asyncio.gather(*(ask(stub, ref, QUESTIONS[n % 3]) for n in range(8)))
        together = time.perf_counter() - began
        info = await stub.GetInfo(pb.GetInfoRequest())
    return {
        "placement": info.placement,
        "routed_chunks": cold.routed_chunks,
        "routing_gb": round(info.residency.routing_bytes / 1e9, 2),
        "cold_first_token_ms": round(cold.first_token, 1),
        "cold_page_in_ms": round(cold.page_in, 1),
        "first_token_ms": round(statistics.median(one.first_token for one in resident), 2),
        "routing_ms": round(statistics.median(one.routing for one in resident), 2),
        "eight_at_once_s": round(together, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="random:135m", help="as a worker's, or random:SHAPE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--routing-keys", default="auto", choices=list(RoutingKeyChoice))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="for the store; by default a temporary one")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        with torch.inference_mode():
            folder = DataFolder(arguments.data_dir)
            model = models.load(arguments.model, folder, "auto", device)
        keys = RoutingKeyChoice(arguments.routing_keys)
        routing = choose(keys, model.config, model.compute_dtype, device)
        engine = MsaEngine(model, str(device), routing=routing)
        (root / "tenants").mkdir()
        store = LmdbStore(DataFolder(root).tenant(TENANT))
        began = time.perf_counter()
        last = fill(store, engine, arguments.tokens)
        store.close()
        filled = time.perf_counter() - began
        budget, why = routing_budget(engine.description, device, None, 1 << 40)
        budgets = Budgets(budget, 1 << 30)
        figures = asyncio.run(serve(root, engine, budgets, last, arguments.repeats))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "machine": machine(),
        "model": arguments.model,
        "tokens": arguments.tokens,
        "budget": why,
        "fill_s": round(filled, 1),
        "peak_gpu_gb": round(peak / 1e9, 2),
        "peak_host_gb": round(host / 1e9, 2),
        **figures,
    }
    print(json.dumps(found) if arguments.json else found)


if __name__ == "__main__":
    main()
