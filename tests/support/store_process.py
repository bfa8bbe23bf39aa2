"""Other processes for tests of the store: LMDB gives each process one handle per file.

Run as `python -m tests.support.store_process COMMAND PATH ...`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import IO

from storage.crypto import TenantKeys
from storage.lmdb_store import LmdbReader, LmdbStore
from storage.store import StorageError, StorageFullError
from tests.support.blocks import SHARED, encoding_id, make_block, make_document, memory_uid
from tests.support.keys import ROOT as ROOT_KEYS
from tests.support.keys import TENANT

ROOT = Path(__file__).parent.parent.parent
MEMORY, ENCODING = memory_uid(1), encoding_id(1)
#: Documents that the endless writer puts into one transaction, with their blocks in the next.
GROUP = 5


class Process:
    """A child that answers one line for each line it is sent."""

    def __init__(self, command: str, path: Path, *arguments: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.store_process", command, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def read(self) -> str:
        """Its next line; empty at its end."""
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def ask(self, question: str = "") -> str:
        """Sends a line, reads one."""
        assert self.child.stdin is not None
        self.child.stdin.write(question + "\n")
        self.child.stdin.flush()
        return self.read()

    def kill(self) -> None:
        """kill -9, and waits for its end."""
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                stream.close()


def _say(out: IO[str], text: str) -> None:
    out.write(text + "\n")
    out.flush()


def serve_reads(path: Path, keys: Path | None) -> None:
    """Answers each line with what a reader sees: numbers of documents and of blocks."""
    source = TenantKeys(keys, TENANT, ROOT_KEYS, readonly=True) if keys else None
    reader = LmdbReader(path, source)
    _say(sys.stdout, "ready")
    for _ in sys.stdin:
        documents = [document.number for document in reader.iter_documents(MEMORY)]
        packed = reader.load_routing(MEMORY, ENCODING, SHARED)
        parts = list(reader.iter_routing(MEMORY, ENCODING, SHARED))
        for part in parts:
            reader.get_content(MEMORY, ENCODING, SHARED, part.number)
        if packed.numbers_N.tolist() != [part.number for part in parts]:
            raise SystemExit("load_routing and iter_routing differ")
        problems = [finding.problem for finding in reader.check()]
        blocks = packed.numbers_N.tolist()
        seen = {"documents": documents, "blocks": blocks, "problems": problems}
        _say(sys.stdout, json.dumps(seen))


def copy_once(path: Path, target: Path) -> None:
    """Opens, waits for a line, and copies what is there by then."""
    reader = LmdbReader(path)
    _say(sys.stdout, "ready")
    sys.stdin.readline()
    with reader.snapshot() as copy:
        copy(target)
    _say(sys.stdout, "copied")


def write_without_end(path: Path) -> None:
    """Writes groups of documents and of their blocks; says each group's end once durable."""
    store = LmdbStore(path)
    numbers = store.document_numbers(MEMORY)
    last = numbers[-1] if numbers else 0
    while True:
        group = range(last + 1, last + 1 + GROUP)
        store.put_documents(MEMORY, [make_document(number) for number in group])
        _say(sys.stdout, f"documents {group[-1]}")
        store.put_blocks(MEMORY, ENCODING, SHARED, [make_block(SHARED, n) for n in group])
        _say(sys.stdout, f"blocks {group[-1]}")
        last = group[-1]


def write_until_full(path: Path, limit: int) -> None:
    """Fills the store until a file may grow no more; says how it went, then writes again."""
    store = LmdbStore(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    last = 0
    try:
        while last < 1_000_000:
            documents = [make_document(last + n, f"{n}" * 4000) for n in range(1, 51)]
            store.put_blocks(MEMORY, ENCODING, SHARED, [make_block(SHARED, last + 1, 4000)])
            store.put_documents(MEMORY, documents)
            last += 50
    except StorageFullError:
        before = store.document_numbers(MEMORY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        store.put_documents(MEMORY, [make_document(10_000_000)])
        after = store.document_numbers(MEMORY)
        problems = [f.problem for f in store.check() if f.problem != "no-document"]
        report = {"before": before, "after": after, "last": last, "problems": problems}
        _say(sys.stdout, json.dumps(report))


def main() -> None:
    """The command line described above."""
    command, path, *rest = sys.argv[1:]
    try:
        if command == "read":
            serve_reads(Path(path), Path(rest[0]) if rest else None)
        elif command == "copy":
            copy_once(Path(path), Path(rest[0]))
        elif command == "write":
            write_without_end(Path(path))
        elif command == "fill":
            write_until_full(Path(path), int(rest[0]))
    except StorageError as error:
        _say(sys.stdout, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
