"""Paging: a memory's routing keys from LMDB to the device, and content of chosen documents.

    python -m benchmarks.paging --device cuda --documents 40000 --json

The memory is synthetic: normally distributed blocks in a 4B model's layout (`--layers` of its
18), in LMDB without encryption, in the page cache. `cold_gb_per_s` is a lease of a memory of
which nothing is held: opening the store, finding, checking, decoding, copying, and taking memory
on the device. The first lease is not counted: in it the pager takes its pinned buffers, once for
all, and torch its memory. The floor is the slower of two rates of the same run: reading the file
from the page cache, and a pinned copy to the device (on a CPU a plain copy); `over_floor` is the
lease's time over the floor's. `--encrypted` measures the same memory encrypted, beside it.
`fetch_ms` brings one layer's content of
1, 16 and 64 documents from host RAM by the kernel (`gather`) and the way that is usual,
index_select on the host and a copy (`select_copy`); without a GPU both are the latter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.storage import keys_for
from model_adapter.engines import choose_device
from model_adapter.msa.kernels import KeyStorage
from model_adapter.msa.kernels.fetch import fetch
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from model_adapter.residency import MemoryKey
from storage.crypto.key_file import TenantKeys
from storage.keys import MAX_NUMBER
from storage.layout import KVBlock, KVLayout
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.store import EncodingId, MemoryUid

TENANT, MEMORY = "0a" * 16, "0b" * 16
UID, ENCODING = MemoryUid(bytes.fromhex(MEMORY)), EncodingId(bytes(15) + b"\x01")
CHUNKS_EACH, POOL_TOKENS, BATCH = 3, 64, 64


def layout_of(layers: int) -> KVLayout:
    """The last `layers` of a 4B model's routed layers."""
    return KVLayout(
        tuple(range(36 - layers, 36)), 8, 128, POOL_TOKENS, "bf16", separate_routing_keys=False
    )


def fill(folder: Path, layout: KVLayout, documents: int, keys: TenantKeys | None = None) -> None:
    """Blocks that share a few arrays: their values do not matter."""
    store = LmdbStore(folder, keys=keys)
    rng = np.random.default_rng(1)
    shape = (len(layout.routed_layers), CHUNKS_EACH, layout.width)
    values = rng.standard_normal((2, *shape), np.float32).view(np.uint32) >> 16
    key, value = values.astype(np.uint16)
    tokens = CHUNKS_EACH * POOL_TOKENS
    for first in range(1, documents + 1, BATCH):
        numbers = range(first, min(first + BATCH, documents + 1))
        blocks = [KVBlock(number, tokens, key, None, value) for number in numbers]
        store.put_blocks(UID, ENCODING, layout, blocks)
    store.close()


def best(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest run, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def read_rate(folder: Path, repeats: int) -> float:
    """Bytes a second of the file from the page cache."""
    path = folder / "data.mdb"
    buffer = bytearray(16 << 20)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return path.stat().st_size / best(read, torch.device("cpu"), repeats)


def copy_rate(device: torch.device, repeats: int, size: int = 256 << 20) -> float:
    """Bytes a second to the device from pinned memory."""
    pinned = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(pinned, device=device)
    return size / best(lambda: target.copy_(pinned, non_blocking=True), device, repeats)


def cold(
    folder: Path, layout: KVLayout, device: torch.device, repeats: int, keys: TenantKeys | None
) -> float:
    """Seconds of a first lease, the median; in one pager, after one to warm it up."""
    readers = Readers(lambda _: LmdbReader(folder, keys))
    budgets = Budgets(1 << 40, 0)
    pager = Pager(layout, ENCODING, readers, budgets, device, storing=KeyStorage(group=128))
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with pager.lease(MemoryKey(TENANT, MEMORY), MAX_NUMBER, 0) as view:
            taken.append(time.perf_counter() - began)
            assert view.resident_keys() is not None
        pager.evict(TENANT)
    readers.close()
    return statistics.median(taken[1:])


def fetches(layout: KVLayout, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by number of documents."""
    documents = 512
    held_CE = torch.randn(documents * CHUNKS_EACH, layout.width).bfloat16()
    if device.type == "cuda":
        held_CE = held_CE.pin_memory()
    found: dict[str, dict[str, float]] = {}
    for count in (1, 16, 64):
        chosen = np.random.default_rng(count).choice(documents, count, replace=False)
        firsts = [int(n) * CHUNKS_EACH for n in sorted(chosen)]
        parts = [held_CE[first : first + CHUNKS_EACH] for first in firsts]
        rows = torch.cat([torch.arange(first, first + CHUNKS_EACH) for first in firsts])
        gather = best(lambda: fetch(parts, device), device, repeats)  # noqa: B023  # called here
        usual = best(lambda: held_CE.index_select(0, rows).to(device), device, repeats)  # noqa: B023  # called here
        found[str(count)] = {
            "gather_ms": round(gather * 1000, 4),
            "select_copy_ms": round(usual * 1000, 4),
            "select_copy_over_gather": round(usual / gather, 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--documents", type=int, default=2000, help=f"of {CHUNKS_EACH} chunks")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the store; by default a temporary one")
    parser.add_argument("--encrypted", action="store_true", help="cold from such a store, too")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    device, layout = choose_device(arguments.device), layout_of(arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, torch.inference_mode():
        folder = Path(name) / "store"
        fill(folder, layout, arguments.documents)
        reading = read_rate(folder, arguments.repeats)
        copying = copy_rate(device, arguments.repeats)
        taken = cold(folder, layout, device, arguments.repeats, None)
        secret_taken = 0.0
        if arguments.encrypted:
            keys, secret = keys_for(Path(name) / "encrypted"), Path(name) / "encrypted"
            fill(secret, layout, arguments.documents, keys)
            secret_taken = cold(secret, layout, device, arguments.repeats, keys)
        fetched = fetches(layout, device, 20 * arguments.repeats)
    chunks = arguments.documents * CHUNKS_EACH
    size = chunks * layout.width * len(layout.routed_layers) * 2
    found: dict[str, object] = {
        "machine": machine(),
        "documents": arguments.documents,
        "routing_gb": round(size / 1e9, 3),
        "cold_s": round(taken, 3),
        "cold_gb_per_s": round(size / taken / 1e9, 3),
        "page_cache_gb_per_s": round(reading / 1e9, 2),
        "copy_gb_per_s": round(copying / 1e9, 2),
        "over_floor": round(taken * min(reading, copying) / size, 2),
        "fetch": fetched,
    }
    if secret_taken:
        found["encrypted_gb_per_s"] = round(size / secret_taken / 1e9, 3)
        found["encrypted_over_plain"] = round(taken / secret_taken, 2)
    print(json.dumps(found) if arguments.json else found)


if __name__ == "__main__":
    main()
