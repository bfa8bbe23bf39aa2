"""Export, delete and import of a memory, against a plain copy of the archive.

    python -m benchmarks.archive --json

The memory is synthetic: documents of one chunk (36 tokens, as a turn of conversation has)
with blocks of random bits in the default model's layout, so that nothing compresses. It is
made of an archive that this writes, and no worker runs. Measured is what the Python client
does over gRPC on this machine: export to a file, deletion, import, which takes over every
block. Beside each stands `cp` of the archive with fsync, in the same run. Memory is the
server's: anonymous pages at their highest (sampled every 10 ms) over those at its start; the
store's mapped file is page cache. At the end the memory is exported again: all members but
the manifest must have the hashes that they had at first.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from benchmarks.service import Service, running
from memsvc.config import load_config
from storage.archive import (
    ArchivedEncoding,
    ArchivedPacking,
    ArchivedRevision,
    Manifest,
    open_archive,
    write_archive,
)
from storage.archive.members import MANIFEST
from storage.catalog import Catalog, ModelRow
from storage.documents import Conversation, Role, Turn
from storage.layout import KVBlock, KVLayout
from storage.store import StoredDocument

LAYOUT = KVLayout(tuple(range(15, 30)), 3, 64, 64, "bf16", separate_routing_keys=False)
IDENTITY = hashlib.sha256(b"benchmarks.archive").hexdigest()
MODEL = ModelRow("bench", "bench", IDENTITY, LAYOUT, 4096, 1024, 256, True, 0)
TOKENS = 36
PER_REVISION = 20
SAMPLE_S = 0.01
PASSPHRASE = "a passphrase for a benchmark"


def documents(count: int) -> Iterator[StoredDocument]:
    """Turns of random words: about TOKENS tokens each."""
    chance = np.random.default_rng(1)
    for number in range(1, count + 1):
        text = " ".join(chance.integers(0, 16**5, TOKENS // 3).astype(str).tolist())
        source = Conversation((Turn(Role.USER, text, None, "Ann", "s"),))
        revision = 1 + (number - 1) // PER_REVISION
        yield StoredDocument(number, revision, 1_770_000_000_000_000 + revision, source)


def blocks(count: int) -> Iterator[KVBlock]:
    """Random bits, but for one that keeps every number finite."""
    chance = np.random.default_rng(2)
    shape = (len(LAYOUT.routed_layers), 1, LAYOUT.width)
    for number in range(1, count + 1):
        key, value = chance.integers(0, 2**16, (2, *shape), np.uint16) & np.uint16(0xBFFF)
        yield KVBlock(number, TOKENS, key, None, value)


def revisions(count: int) -> Iterator[ArchivedRevision]:
    """One for each PER_REVISION documents."""
    for revision in range(1, 2 + (count - 1) // PER_REVISION):
        last = min(count, revision * PER_REVISION)
        added = last - (revision - 1) * PER_REVISION
        yield ArchivedRevision(revision, 1_770_000_000_000_000 + revision, added, 0, last)


def write(path: Path, count: int) -> None:
    """The archive that the memory is made of."""
    told = list(revisions(count))
    encoding = ArchivedEncoding(MODEL.model_id, IDENTITY, LAYOUT, count)
    manifest = Manifest(
        created_at_us=1_770_000_000_000_000,
        display_name="bench",
        packing=ArchivedPacking("turn", 0, 0),
        revision=len(told),
        last_number=count,
        documents=count,
        encodings=(encoding,),
        revisions=len(told),
    )
    parts = write_archive(
        manifest, documents(count), {encoding.encoding_id: blocks(count)}, revisions=told
    )
    with path.open("wb") as file:
        file.writelines(parts)


def members(path: Path) -> dict[str, str]:
    """SHA-256 of every member but the manifest, which tells the time of the export."""
    with open_archive(path) as archive:
        return {one.name: one.sha256 for one in archive.members if one.name != MANIFEST}


def copy(source: Path, target: Path) -> None:
    """As cp, but on disk when it returns."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


class Memory(threading.Thread):
    """Anonymous memory of a process, sampled until `stop`. Bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self.started = self.peak = self._now()

    def _now(self) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise RuntimeError("the kernel does not tell a process's anonymous memory")

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.wait(SAMPLE_S):
            self.peak = max(self.peak, self._now())

    def stop(self) -> int:
        """The most above what there was at the start."""
        self._over.set()
        self.join()
        return self.peak - self.started


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(service: Service, folder: Path, count: int, rounds: int) -> dict[str, object]:
    """Makes the memory, then exports, deletes and imports it again and again."""
    first, out, copied = folder / "first.msamem", folder / "out.msamem", folder / "copy.msamem"
    write(first, count)
    watched = Memory(service.process)
    watched.start()
    times: dict[str, list[float]] = {name: [] for name in ("export", "delete", "import", "copy")}
    with service.client() as client:
        client.memories.import_archive(first, memory_id="bench")
        for _ in range(rounds):
            times["export"].append(timed(lambda: client.memory("bench").export_to(out)))
            times["copy"].append(timed(lambda: copy(out, copied)))
            times["delete"].append(timed(lambda: client.memories.delete("bench")))
            times["import"].append(
                timed(lambda: client.memories.import_archive(out, memory_id="bench"))
            )
            times["copy"].append(timed(lambda: copy(out, copied)))
        peak = watched.stop()
        sealing = timed(lambda: client.memory("bench").export_to(copied, passphrase=PASSPHRASE))
        made = client.memories.import_archive(out)
    size = out.stat().st_size
    best = {name: min(found) for name, found in times.items()}
    return {
        "documents": count,
        "tokens": count * TOKENS,
        "archive_bytes": size,
        "seconds": {name: [round(one, 3) for one in found] for name, found in times.items()},
        "mb_per_s": {name: round(size / 1e6 / best[name]) for name in ("export", "import", "copy")},
        "of_a_copy": {name: round(best["copy"] / best[name], 3) for name in ("export", "import")},
        "export_under_a_passphrase_s": round(sealing, 3),
        "server_peak_above_start_mb": round(peak / 1e6, 1),
        "blocks_reused": made.reused_blocks,
        "equal": members(first) == members(out),
    }


async def know_the_model(url: str) -> None:
    """As if a worker of it had served here."""
    catalog = await Catalog.open(url)
    try:
        await catalog.upsert_model(MODEL)
    finally:
        await catalog.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archive")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="memsvc-archive-", dir=options.folder) as made:
        folder = Path(made)
        data = folder / "data"
        # Once before it serves, so that there is a catalog to know the model.
        with running(data, "none", "worker_address=none"):
            pass
        asyncio.run(know_the_model(load_config({"data": data}).catalog_url))
        with running(data, "none", "worker_address=none") as service:
            count = max(1, options.tokens // TOKENS)
            found = measure(service, folder, count, options.rounds)
    result = {**machine(), **found}
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
