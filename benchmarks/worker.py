"""What a worker adds around its engine: paging a memory in, and one query's overhead.

  python -m benchmarks.worker --json

The memory is synthetic: normally distributed bf16 blocks in the default model's layout,
32 tokens a document chunk. Page-in reads them from LMDB, warm in the page cache, into
the tensors that routing reads. Overhead is a whole query over gRPC on a unix socket,
with the deterministic engine, on a memory of one document and an answer of one word.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grpc import aio

from model_adapter.engine import DocumentText
from model_adapter.engines import load_engine
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from model_adapter.residency import MemoryKey
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceStub
from model_adapter.worker import WorkerConfig, serving
from storage.documents import TextSource
from storage.layout import KVBlock, KVLayout
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.paths import DataFolder
from storage.store import EncodingId, MemoryUid, StoredDocument

LAYOUT = KVLayout(tuple(range(15, 30)), 3, 64, 32, "bf16", separate_routing_keys=False)
TENANT, MEMORY = "0a" * 16, "0b" * 16
UID, ENCODING = MemoryUid(bytes.fromhex(MEMORY)), EncodingId(bytes(15) + b"\x01")
_BATCH = 256


def fill(store: LmdbStore, documents: int, tokens: int) -> None:
    """Writes synthetic blocks. All share a few arrays: their values do not matter."""
    rng = np.random.default_rng(1)
    shape = (len(LAYOUT.routed_layers), LAYOUT.chunks(tokens), LAYOUT.width)
    values = rng.standard_normal((2, *shape), np.float32).view(np.uint32) >> 16
    key, value = values.astype(np.uint16)
    for first in range(1, documents + 1, _BATCH):
        numbers = range(first, min(first + _BATCH, documents + 1))
        store.put_blocks(
            UID, ENCODING, LAYOUT, [KVBlock(number, tokens, key, None, value) for number in numbers]
        )


def page_in(root: Path, documents: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Rates of reading a whole memory's routing keys, and of one document's content."""
    store = LmdbStore(root / "paged")
    fill(store, documents, tokens)
    store.close()
    readers = Readers(lambda _: LmdbReader(root / "paged"))
    budgets = Budgets(4 * 2**30, 0)
    pager = Pager(LAYOUT, ENCODING, readers, budgets, torch.device("cpu"))
    name = MemoryKey(TENANT, MEMORY)
    seconds, again = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        pager.lease(name, documents, 0).release()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        pager.lease(name, documents, 0).release()
        again.append(time.perf_counter() - began)
        held = pager.residency().routing_bytes
        pager.evict(TENANT)
    chosen = list(range(0, documents, max(documents // 16, 1)))[:16]
    with pager.lease(name, documents, 0) as view:
        began = time.perf_counter()
        for _ in range(repeats):
            view.content(3, chosen)
        content_s = (time.perf_counter() - began) / repeats
        began = time.perf_counter()
        streaming = Pager(LAYOUT, ENCODING, readers, Budgets(0, 0), torch.device("cpu"))
        with streaming.lease(name, documents, 0) as streamed:
            indexed_s = time.perf_counter() - began
            began = time.perf_counter()
            for _first, _keys in streamed.routing_keys(0):
                pass
            streamed_s = time.perf_counter() - began
    useful = documents * LAYOUT.chunks(tokens) * LAYOUT.width * len(LAYOUT.routed_layers) * 2
    return {
        "documents": documents,
        "tokens_each": tokens,
        "routing_bytes": useful,
        "tensor_bytes": held,
        "page_in_s": min(seconds),
        "page_in_gb_per_s": useful / min(seconds) / 1e9,
        "lease_resident_ms": min(again) * 1e3,
        "content_of_16_documents_ms": content_s * 1e3,
        "streamed_first_lease_s": indexed_s,
        "streamed_layer_s": streamed_s,
    }


async def overhead(root: Path, queries: int) -> dict[str, Any]:
    """Milliseconds of a query that costs the engine next to nothing."""
    device = torch.device("cpu")
    engine = load_engine("fake", DataFolder(root), device, "auto")
    config = WorkerConfig(f"unix:{root}/w.sock", DataFolder(root), Budgets(2**30, 2**30))
    identity = engine.description.identity
    with_text = engine.encode([DocumentText(1, "boat")]).blocks
    (root / "tenants").mkdir()
    store = LmdbStore(DataFolder(root).tenant(TENANT))
    store.put_documents(UID, [StoredDocument(1, 1, 0, TextSource("boat"))])
    encoding = EncodingId(bytes.fromhex(identity)[:16])
    store.put_blocks(UID, encoding, engine.description.layout, with_text)
    store.close()
    ref = pb.MemoryRef(tenant=TENANT, memory_uid=MEMORY, last_number=1, identity=identity)
    async with (
        serving(engine, device, config, lambda: None) as address,
        aio.insecure_channel(address) as channel,
    ):
        stub = ModelAdapterServiceStub(channel)

        async def ask() -> tuple[float, float]:
            began = time.perf_counter()
            async for event in stub.Query(pb.QueryRequest(memory=ref, question="boat")):
                last = event
            return (time.perf_counter() - began) * 1e3, last.finished.page_in_ms

        await ask()
        alone = [await ask() for _ in range(queries)]
        began = time.perf_counter()
        for _ in range(queries // 16):
            await asyncio.gather(*(ask() for _ in range(16)))
        rate = (queries // 16) * 16 / (time.perf_counter() - began)
    return {
        "query_ms_p50": statistics.median(ms for ms, _ in alone),
        "query_ms_p99": sorted(ms for ms, _ in alone)[int(0.99 * len(alone))],
        "page_in_ms_p50": statistics.median(page for _, page in alone),
        "queries_per_s_16_at_once": rate,
    }


def main() -> None:
    """Prints one JSON object, or its figures line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--queries", type=int, default=320)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        figures = page_in(root, options.documents, options.tokens, repeats=5)
        figures |= asyncio.run(overhead(root, options.queries))
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:28} {value:.4g}")


if __name__ == "__main__":
    main()
