"""What a filter costs a worker: making the attributes, finding what matches, routing over it.

    python -m benchmarks.filters --json

Memories of one-turn documents of one chunk in a real store (not encrypted), one routed layer
of the default model's width. "run": a range of time that half of the documents lie in, which lie
together; "scattered": one of two speakers in turns. Times are the processor's, of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model_adapter.masking import MaskedView
from model_adapter.msa.config import ChunkReduce, QueryReduce
from model_adapter.msa.routing import RoutingQuery, score_documents
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from model_adapter.residency import MemoryKey
from storage.documents import Conversation, Role, Turn
from storage.filters import DocumentFilter
from storage.layout import KVBlock, KVLayout
from storage.lmdb_store import LmdbStore
from storage.store import EncodingId, MemoryUid, StoredDocument

SIZES = (1_000, 10_000, 100_000)
TENANT, MEMORY = "a0" * 16, "0" * 31 + "1"
LAYOUT = KVLayout((22,), 3, 64, 64, "bf16", separate_routing_keys=False)
ENCODING = EncodingId(b"\x07" * 16)
_BATCH, _TOKENS, _QUESTION_TOKENS, _REPEATS = 1000, 60, 16, 9
_START = datetime(2026, 1, 1, tzinfo=UTC)


def fill(store: LmdbStore, count: int) -> None:
    """Documents, and blocks of drawn values."""
    draw = np.random.default_rng(0)
    for first in range(1, count + 1, _BATCH):
        numbers = range(first, min(first + _BATCH, count + 1))
        keys = draw.integers(0x3C00, 0x3F80, (len(numbers), 1, 1, LAYOUT.width)).astype("<u2")
        store.put_documents(MemoryUid(bytes.fromhex(MEMORY)), [document(n) for n in numbers])
        blocks = [KVBlock(n, _TOKENS, own, None, own) for n, own in zip(numbers, keys, strict=True)]
        store.put_blocks(MemoryUid(bytes.fromhex(MEMORY)), ENCODING, LAYOUT, blocks)


def document(number: int) -> StoredDocument:
    """A turn of Anna's or Bob's, an hour after the one before."""
    turn = Turn(
        Role.USER,
        "I took the night train and saw the boats in the harbour. " * 5,
        _START + timedelta(hours=number),
        "Anna" if number % 2 else "Bob",
        metadata={"app": "chat"},
    )
    return StoredDocument(number, number, 0, Conversation((turn,)))


def milliseconds(work: Callable[[], object]) -> float:
    """Median of some repeats."""
    took = []
    for _ in range(_REPEATS):
        began = time.process_time()
        work()
        took.append((time.process_time() - began) * 1000)
    return round(statistics.median(took), 2)


def measure(count: int, folder: Path) -> dict[str, float | int]:
    store = LmdbStore(folder / str(count))
    fill(store, count)
    budgets = Budgets(1 << 30, 1 << 20, attribute_bytes=1 << 28)
    readers = Readers(lambda _: store)
    pager = Pager(LAYOUT, ENCODING, readers, budgets, torch.device("cpu"))
    filters = {
        "run": DocumentFilter(occurred_from=_START + timedelta(hours=count // 2)),
        "scattered": DocumentFilter(speakers=frozenset(["Anna"])),
    }
    query = RoutingQuery(
        torch.randn(_QUESTION_TOKENS, LAYOUT.width), None, 16, QueryReduce.MAX, ChunkReduce.MAX
    )
    with pager.lease(MemoryKey(TENANT, MEMORY), count, 0) as lease:
        began = time.process_time()
        lease.matching(filters["run"])
        report: dict[str, float | int] = {
            "documents": count,
            "make_s": round(time.process_time() - began, 3),
            "bytes_per_document": pager.residency().attribute_bytes // count,
            "route_all_ms": milliseconds(lambda: score_documents(query, lease, 0)),
        }
        for name, wanted in filters.items():
            view = MaskedView(lease, lease.matching(wanted))
            report[f"{name}_match_ms"] = milliseconds(partial(lease.matching, wanted))
            report[f"{name}_route_ms"] = milliseconds(partial(score_documents, query, view, 0))
    store.close()
    return report


def main(argv: list[str] | None = None) -> int:
    """Prints one line per size, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filters")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        reports = [measure(size, Path(folder)) for size in SIZES]
    if arguments.json:
        print(json.dumps({"sizes": reports}))
    else:
        for report in reports:
            print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
