"""What a fork of a large memory costs: milliseconds at the client, bytes in the data folder.

    python -m benchmarks.fork --json

A generated conversation is appended, a document for each turn, and encoded. Its turns have 86
tokens on average under the default model (benchmarks.ingest), so the 11,700 of them are a
memory of 1M tokens; the fake engine, used unless another model is named, counts words. The
memory is forked `--forks` times, as of now and as of the middle of its past; each fork is
looked at, and all of them but one are deleted, and the parent. Single turns are appended to
another memory in the same run, to compare with. Bytes are those of all files of the data folder
with the server stopped, before and after the forks as of now, divided by their number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.ingest import as_turn, quantiles, wait_encoded
from benchmarks.machine import machine
from benchmarks.service import running
from benchmarks.workload import conversation
from memsvc.client import Client

PARENT = "parent"
TURNS_PER_APPEND = 500


def fill(client: Client, turns: int, seed: int) -> int:
    """Appends the conversation and waits until it is encoded; returns the last revision."""
    lines = conversation(seed, turns)
    client.memories.create(PARENT)
    revision = 0
    while batch := [as_turn(line) for line in islice(lines, TURNS_PER_APPEND)]:
        revision = client.memory(PARENT).append(batch).revision
    wait_encoded(client, PARENT, revision)
    return revision


def timed_ms(call: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def folder_bytes(path: Path) -> int:
    """Of all files below, but for models and logs."""
    kept = (p for p in path.rglob("*") if p.is_file() and "models" not in p.parts)
    return sum(p.stat().st_blocks * 512 for p in kept)


def fork_all(client: Client, forks: int) -> dict[str, object]:
    """As of now; each is looked at."""
    memory = client.memory(PARENT)
    held = client.memories.get(PARENT).document_count
    now = [timed_ms(partial(memory.fork, f"now-{n}")) for n in range(forks)]
    for number in range(forks):
        made = client.memories.get(f"now-{number}")
        assert made.document_count == held, made
        assert all(encoding.pending_documents == 0 for encoding in made.encodings)
    client.memories.create("beside")
    turns = [as_turn(line) for line in conversation(99, forks)]
    appends = [timed_ms(partial(client.memory("beside").append, [turn])) for turn in turns]
    return {"fork_ms": quantiles(now), "append_one_turn_ms": quantiles(appends)}


def fork_past(client: Client, forks: int, revision: int) -> dict[str, object]:
    """As of a revision."""
    memory = client.memory(PARENT)
    then = [timed_ms(partial(memory.fork, f"then-{n}", as_of=revision)) for n in range(forks)]
    return {"fork_as_of_ms": quantiles(then)}


def delete_all(client: Client, forks: int) -> dict[str, object]:
    """All forks but one, then the parent; what is left is whole."""
    question = "Who repaired the blue violin?"
    before = client.memory("now-0").retrieve(question, full=False)
    gone = [timed_ms(partial(client.memories.delete, f"now-{n}")) for n in range(1, forks)]
    held = client.memories.get(PARENT).document_count
    last = timed_ms(lambda: client.memories.delete(PARENT))
    after = client.memory("now-0").retrieve(question, full=False)
    assert [d.number for d in after.documents] == [d.number for d in before.documents]
    assert client.memories.get("now-0").document_count == held
    return {"delete_fork_ms": quantiles(gone), "delete_parent_ms": round(last, 1)}


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """All of it, in a data folder that is new."""
    data, forks = folder / "data", arguments.forks
    with running(data, arguments.model) as service, service.client() as client:
        revision = fill(client, arguments.turns, arguments.seed)
        parent = client.memories.get(PARENT)
    before = folder_bytes(data)
    with running(data, arguments.model) as service, service.client() as client:
        figures = fork_all(client, forks)
    added = folder_bytes(data) - before
    with running(data, arguments.model) as service, service.client() as client:
        figures |= fork_past(client, forks, revision // 2)
        figures |= delete_all(client, forks)
    return {
        "tokens_of_the_model": parent.encodings[0].tokens,
        "documents": parent.document_count,
        "parent_bytes": before,
        "bytes_per_fork": added // forks,
        "forks": forks,
        **figures,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fake")
    parser.add_argument("--turns", type=int, default=11_700)
    parser.add_argument("--forks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {"machine": machine(), **measure(Path(folder), arguments)}
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
