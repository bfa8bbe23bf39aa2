"""Storage alone: durable writes, page-in warm and cold, codecs, encryption, archives.

    python -m benchmarks.storage --json

Two memories with the default model's layout: 28,000 documents of one chunk, and 500
of 32 chunks. Values are normally distributed bf16. Cold means that the
file's pages were dropped from the page cache before. GB/s are of routing keys.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np

from storage.archive import (
    ArchivedEncoding,
    ArchivedPacking,
    Manifest,
    export_memory,
    open_archive,
    stage_archive,
)
from storage.block_records import BlockCodecs
from storage.codecs import Codec, to_bf16
from storage.crypto import LocalRootKeys, TenantKeys
from storage.documents import TextSource
from storage.layout import KVBlock, KVLayout
from storage.lmdb_store import LmdbOptions, LmdbReader, LmdbStore
from storage.store import EncodingId, MemoryUid, StoredDocument

LAYOUT = KVLayout(tuple(range(15, 30)), 3, 64, 64, "bf16", separate_routing_keys=False)
MEMORY = MemoryUid(b"m" * 16)
IDENTITY = "ab" * 32
TENANT = "0a" * 16
ENCODING = EncodingId(bytes.fromhex(IDENTITY)[:16])
SHAPES = {"28000 of 1 chunk": (28_000, 40), "500 of 32 chunks": (500, 2048)}
Figures = dict[str, float]


def timed(work: Callable[[], object], rounds: int = 1) -> float:
    """Seconds of the fastest of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def blocks(count: int, tokens: int) -> Iterator[KVBlock]:
    """Blocks 1 to count; the arrays are a few, used again."""
    rng = np.random.default_rng(0)
    shape = (len(LAYOUT.routed_layers), LAYOUT.chunks(tokens), LAYOUT.width)
    arrays = [to_bf16(rng.standard_normal(shape, np.float32)) for _ in range(8)]
    for number in range(1, count + 1):
        yield KVBlock(number, tokens, arrays[number % 8], None, arrays[(number + 3) % 8])


def keys_for(path: Path) -> TenantKeys:
    """Keys of the store at `path`, in a file beside it."""
    root = LocalRootKeys([bytes(32)])
    return TenantKeys(path.with_suffix(".keys"), TENANT, root, create=True)


def fill(
    path: Path,
    count: int,
    tokens: int,
    group: int,
    codec: Codec = Codec.RAW,
    keys: TenantKeys | None = None,
) -> float:
    """Writes `count` blocks, `group` in a transaction. Returns MB/s of unpacked blocks."""
    store = LmdbStore(path, LmdbOptions(codecs=BlockCodecs(codec, codec)), keys)
    held = list(blocks(count, tokens))

    def write() -> None:
        for start in range(0, count, group):
            store.put_blocks(MEMORY, ENCODING, LAYOUT, held[start : start + group])

    seconds = timed(write)
    store.close()
    return count * LAYOUT.block_bytes(tokens) / seconds / 1e6


def drop_cache(path: Path) -> None:
    """Leaves nothing of the file in the page cache."""
    descriptor = os.open(path / "data.mdb", os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def page_in(path: Path, count: int, tokens: int) -> Figures:
    """Reads of all routing keys, and of single contents."""
    size = count * LAYOUT.block_bytes(tokens) / 2
    reader = LmdbReader(path)

    def load() -> object:
        return reader.load_routing(MEMORY, ENCODING, LAYOUT)

    def iterate() -> None:
        for _ in reader.iter_routing(MEMORY, ENCODING, LAYOUT):
            pass

    def contents() -> None:
        for number in range(1, count, max(1, count // 200)):
            reader.get_content(MEMORY, ENCODING, LAYOUT, number)

    warm, parts = timed(load, 5), timed(iterate, 3)
    figures = {
        "load_routing_warm_gb_s": size / warm / 1e9,
        "load_routing_us_per_document": warm / count * 1e6,
        "iter_routing_warm_gb_s": size / parts / 1e9,
        "iter_routing_us_per_document": parts / count * 1e6,
        "get_content_warm_us": timed(contents, 3)
        / len(range(1, count, max(1, count // 200)))
        * 1e6,
    }
    reader.close()
    drop_cache(path)
    reader = LmdbReader(path)
    figures["load_routing_cold_gb_s"] = size / timed(load) / 1e9
    reader.close()
    drop_cache(path)
    reader = LmdbReader(path)
    with patch("storage.lmdb_records.prefetch"):
        figures["load_routing_cold_without_prefetch_gb_s"] = size / timed(load) / 1e9
    reader.close()
    return figures


def encryption(path: Path, count: int, tokens: int, rounds: int) -> Figures:
    """Cold opens of an encrypted memory beside a plain one, in turn; medians and their ratio.

    A cold open is what a worker does first: all routing keys, from a file that is not
    in the page cache, then the contents of 16 documents.
    """
    coded = path.with_name(f"{path.name}-encrypted")
    keys = keys_for(coded)
    written = fill(coded, count, tokens, 64, keys=keys)
    chosen = range(1, count, max(1, count // 16))
    seconds: dict[str, list[float]] = {"plain": [], "encrypted": [], "warm": [], "warm_enc": []}

    def open_all(place: Path, source: TenantKeys | None, label: str, warm: str) -> None:
        drop_cache(place)
        reader = LmdbReader(place, source)

        def read() -> None:
            reader.load_routing(MEMORY, ENCODING, LAYOUT)
            for number in chosen:
                reader.get_content(MEMORY, ENCODING, LAYOUT, number)

        seconds[label].append(timed(read))
        seconds[warm].append(timed(read))
        reader.close()

    for _ in range(rounds):
        open_all(path, None, "plain", "warm")
        open_all(coded, keys_for(coded), "encrypted", "warm_enc")
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "write_64_encrypted_mb_s": written,
        "cold_open_plain_ms": middle["plain"] * 1e3,
        "cold_open_encrypted_ms": middle["encrypted"] * 1e3,
        "cold_open_ratio": middle["plain"] / middle["encrypted"],
        "warm_open_ratio": middle["warm"] / middle["warm_enc"],
    }


def archive(path: Path, folder: Path, count: int, tokens: int) -> Figures:
    """Export to a file, and verified reading of it."""
    store = LmdbStore(path)
    for start in range(1, count + 1, 1000):
        numbers = range(start, min(start + 1000, count + 1))
        store.put_documents(
            MEMORY, [StoredDocument(n, n, n, TextSource(f"text {n} " * 20)) for n in numbers]
        )
    manifest = Manifest(
        0,
        "benchmark",
        ArchivedPacking("turn", 0, 0),
        count,
        count,
        encodings=(ArchivedEncoding("default", IDENTITY, LAYOUT),),
    )
    target = folder / "archive"
    pieces = export_memory(store, MEMORY, manifest, list(range(1, count + 1)))
    export = timed(lambda: stage_archive(target, pieces))
    store.close()
    size = target.stat().st_size / 1e6
    verify = timed(lambda: open_archive(target).close())
    return {"archive_mb": size, "export_mb_s": size / export, "verify_mb_s": size / verify}


def main() -> None:
    """Prints one JSON object, or lines of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else a temporary one")
    arguments = parser.parse_args()
    report: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for title, (count, tokens) in SHAPES.items():
            few = min(count, 2000)
            path = folder / str(count)
            report[title] = {
                f"write_{group}_per_transaction_mb_s": fill(
                    folder / f"{count}-{group}", few if group > 1 else 200, tokens, group
                )
                for group in (1, 16, 64, 256)
            }
            report[title]["write_zstd_mb_s"] = fill(path, few, tokens, 64, Codec.ZSTD)
            report[title]["write_int8_mb_s"] = fill(path, few, tokens, 64, Codec.INT8)
            fill(path, count, tokens, 64)
            report[title] |= page_in(path, count, tokens)
            report[title] |= encryption(path, count, tokens, rounds=7)
            report[title] |= archive(path, folder, count, tokens)
            (folder / "archive").unlink()
    if arguments.json:
        print(json.dumps(report))
    else:
        for title, figures in report.items():
            print(title)
            for figure, value in figures.items():
                print(f"  {figure:48} {value:10.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
