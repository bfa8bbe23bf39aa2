"""Paging: a memory's routing keys from LMDB to the device, and content of chosen documents.

    python -m benchmarks.paging --device cuda --documents 40000 --json

The memory is synthetic: normally distributed blocks in a 4B model's layout (`--layers` of its
18), in LMDB without encryption, in the page cache. `cold_gb_per_s` is a lease of a memory of
which nothing is held: opening the store, finding, checking, decoding, copying, and taking memory
on the device. The first lease is not counted: in it the pager takes its pinned buffers, once for
all, and torch its memory. The floor is the slower of two rates of the same run: reading the file
from the page cache, and a pinned copy to the device (on a CPU a plain copy); `over_floor` is the
lease's time over the floor's. `--encrypted` measures the same memory encrypted, beside it.
`fetch` brings one layer's values of 1, 16 and 64 documents from host RAM, in milliseconds until
the device has them: as a lease does that reads them from the store, joined in a pinned buffer
(`carried`); as it does after that on a GPU, by a kernel from where they lie, the keys from the
device's table at the same time, with the addresses looked up (`fetched`) or known from another
layer (`fetched_again`); and the way that is usual, index_select on the host and a copy
(`select_copy`), also into a pinned buffer that is kept and with a copy that nobody waits for
before the end (`select_pinned`). `select_copy_over` says how many times as long the usual way
takes. `lease` is what a layer asks of a lease: keys from the table and values from RAM, found by
document, where all layers ask for the same (`together`) or each for others than the one before
(`each`); `lease_over_select_copy` compares them with the usual way. Without a GPU nothing is
pinned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import machine
from benchmarks.storage import keys_for
from model_adapter.carrying import Carrier
from model_adapter.engines import choose_device
from model_adapter.fetching import Fetcher, Selection
from model_adapter.msa.kernels import KeyStorage
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from model_adapter.residency import MemoryKey
from model_adapter.tensors import Words, words
from storage.crypto.key_file import TenantKeys
from storage.keys import MAX_NUMBER
from storage.layout import KVBlock, KVLayout
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.store import EncodingId, MemoryUid

TENANT, MEMORY = "0a" * 16, "0b" * 16
UID, ENCODING = MemoryUid(bytes.fromhex(MEMORY)), EncodingId(bytes(15) + b"\x01")
CHUNKS_EACH, POOL_TOKENS, BATCH = 3, 64, 64
#: Documents whose content a layer asks for.
COUNTS = (1, 16, 64)


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
    documents, on_gpu = 512, device.type == "cuda"
    held_CE = torch.randn(documents * CHUNKS_EACH, layout.width).bfloat16()
    buffer_CE = torch.empty(64 * CHUNKS_EACH, layout.width, dtype=torch.bfloat16)
    if on_gpu:
        held_CE, buffer_CE = held_CE.pin_memory(), buffer_CE.pin_memory()
    carrier, words_CW, fetcher = Carrier(device), words(held_CE), Fetcher.of(device, layout)
    table_CE = held_CE.to(device)
    found: dict[str, dict[str, float]] = {}
    for count in COUNTS:
        firsts_n = CHUNKS_EACH * chosen_of(documents, count)
        rows = torch.from_numpy((firsts_n[:, None] + np.arange(CHUNKS_EACH)).reshape(-1))
        parts = [words_CW[first : first + CHUNKS_EACH] for first in firsts_n]
        small_CE = buffer_CE[: len(rows)]

        def carried(parts: list[Words] = parts, rows: torch.Tensor = rows) -> torch.Tensor:
            return carrier(parts, rows.numpy(), held_CE.dtype)[0]

        def usual(rows: torch.Tensor = rows) -> torch.Tensor:
            return held_CE.index_select(0, rows).to(device)

        def pinned(rows: torch.Tensor = rows, small_CE: torch.Tensor = small_CE) -> torch.Tensor:
            torch.index_select(held_CE, 0, rows, out=small_CE)
            return small_CE.to(device, non_blocking=True, copy=True)

        assert torch.equal(carried(), usual()) and torch.equal(pinned(), usual())
        ways: dict[str, Callable[[], object]]
        ways = {"select_copy": usual, "select_pinned": pinned, "carried": carried}
        if fetcher is not None:
            ways |= kernel_ways(fetcher, table_CE, held_CE, firsts_n)
            for name in ("fetched", "fetched_again"):
                values_RE = ways[name]()
                assert isinstance(values_RE, torch.Tensor) and torch.equal(values_RE, usual())
        taken = {name: best(way, device, repeats) for name, way in ways.items()}
        found[str(count)] = {f"{name}_ms": round(s * 1000, 4) for name, s in taken.items()}
        for name in [name for name in taken if name != "select_copy"]:
            ratio = round(taken["select_copy"] / taken[name], 2)
            found[str(count)][f"select_copy_over_{name}"] = ratio
    return found


def kernel_ways(
    fetcher: Fetcher,
    table_CE: torch.Tensor,
    held_CE: torch.Tensor,
    firsts_n: npt.NDArray[np.int64],
) -> dict[str, Callable[[], object]]:
    """Values of the documents that begin at these chunks, with keys out of a table."""
    chunks_n = np.full(len(firsts_n), CHUNKS_EACH)

    def select() -> Selection:
        keys_n, values_n = (
            t.data_ptr() + firsts_n * fetcher.row_bytes for t in (table_CE, held_CE)
        )
        rows = fetcher.rows(keys_n, chunks_n), fetcher.rows(values_n, chunks_n)
        return fetcher.select([], *rows, [], 0)

    known = select()
    return {
        "fetched": lambda: fetcher.bring(select(), 0, 1)[0][1],
        "fetched_again": lambda: fetcher.bring(known, 0, 1)[0][1],
    }


def leases(
    folder: Path, layout: KVLayout, device: torch.device, repeats: int, documents: int
) -> dict[str, float]:
    """Milliseconds of one layer's keys and values, by number of documents, as far as there are so
    many; all held in RAM. Of all layers one after another, which ask for the same, or for others
    than the layer before."""
    readers = Readers(lambda _: LmdbReader(folder))
    storing = KeyStorage(group=128)
    fetcher = Fetcher.of(device, layout)
    budgets = Budgets(1 << 40, 1 << 28)
    pager = Pager(layout, ENCODING, readers, budgets, device, storing=storing, fetcher=fetcher)
    found: dict[str, float] = {}
    layers, places = len(layout.routed_layers), min(documents, 512)

    def together(chosen: list[list[int]]) -> None:
        for layer in range(layers):
            view.content(layer, chosen[0])

    def each(chosen: list[list[int]]) -> None:
        for layer in range(layers):
            view.content(layer, chosen[layer % 2])

    with pager.lease(MemoryKey(TENANT, MEMORY), MAX_NUMBER, 0) as view:
        for count in (count for count in COUNTS if count <= documents):
            chosen = [chosen_of(places, count, seed).tolist() for seed in (1, 2)]
            for name, way in (("together", together), ("each", each)):
                seconds = best(partial(way, chosen), device, max(1, repeats // 10))
                found[f"{count}_{name}_ms"] = round(seconds / layers * 1000, 4)
    pager.evict(TENANT)
    readers.close()
    return found


def chosen_of(documents: int, count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Positions of so many documents, ascending."""
    chosen = np.random.default_rng([count, seed]).choice(documents, count, replace=False)
    return np.sort(chosen).astype(np.int64)


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
        repeats = 20 * arguments.repeats
        fetched = fetches(layout, device, repeats)
        leased = leases(folder, layout, device, repeats, arguments.documents)
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
        "lease": leased,
        "lease_over_select_copy": {
            name: round(ms / fetched[name.partition("_")[0]]["select_copy_ms"], 2)
            for name, ms in leased.items()
        },
    }
    if secret_taken:
        found["encrypted_gb_per_s"] = round(size / secret_taken / 1e9, 3)
        found["encrypted_over_plain"] = round(taken / secret_taken, 2)
    print(json.dumps(found) if arguments.json else found)


if __name__ == "__main__":
    main()
