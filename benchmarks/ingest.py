"""Ingest speed: a whole service against its engine alone, on the same text in one run.

    python -m benchmarks.ingest --json

The engine alone encodes the generated conversation in a process of its own, before and
after the service does; its speed is the mean of the two. The service's clock runs from
the first append to the moment when everything is encoded and durable; `ratio` is its
tokens per second over the engine alone. Then the service does it once more, while a
second client appends single turns to another memory, 20 a second at most, and times
each reply, which comes after fsync: `with_trickle`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.machine import machine
from benchmarks.service import MODEL_CACHE, Service, running
from benchmarks.workload import Line, conversation
from memsvc.client import Client, EncodingState, Turn
from storage import documents
from storage.paths import DataFolder

Item = TypeVar("Item")

TURNS_PER_APPEND = 50
#: Documents of one encode call of the engine alone: the most that the wire allows.
BARE_BATCH = 256


def bare(model: str, turns: int, seed: int) -> dict[str, float]:
    """Encodes the conversation with nothing around the engine."""
    import torch  # noqa: PLC0415  # the service side of this benchmark runs without it

    from model_adapter.engine import DocumentText  # noqa: PLC0415
    from model_adapter.engines import load_engine  # noqa: PLC0415

    engine = load_engine(model, DataFolder(MODEL_CACHE.parent), torch.device("cpu"), "auto")
    texts = [
        DocumentText(number, documents.render(as_source(line)))
        for number, line in enumerate(conversation(seed, turns), start=1)
    ]
    engine.encode(texts[:BARE_BATCH])  # warms up
    started = time.perf_counter()
    tokens = 0
    for batch in _batches(texts, BARE_BATCH):
        encoded = engine.encode(batch)
        assert not encoded.failures
        tokens += sum(block.tokens for block in encoded.blocks)
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def _batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def as_source(line: Line) -> documents.Source:
    """The document that turn packing makes of a line."""
    turn = documents.Turn(documents.Role.USER, line.text, line.occurred_at, line.speaker)
    return documents.Conversation((turn,))


def as_turn(line: Line) -> Turn:
    """A line as a client appends it."""
    return Turn("user", line.text, occurred_at=line.occurred_at, speaker=line.speaker)


def _bare_apart(arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ingest", "--bare", "--model", arguments.model]
    command += ["--turns", str(arguments.turns), "--seed", str(arguments.seed)]
    reply = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(reply.stdout)
    return figures


class Trickle:
    """A client that appends single turns, one after another, and times the replies."""

    def __init__(self, service: Service, pause_s: float) -> None:
        self._service, self._pause_s = service, pause_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.replies_ms: list[float] = []

    def __enter__(self) -> Trickle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._service.client() as client:
            memory = client.memory("trickle")
            for line in conversation(99, 1_000_000):
                if self._over.wait(self._pause_s):
                    return
                started = time.perf_counter()
                memory.append([as_turn(line)])
                self.replies_ms.append((time.perf_counter() - started) * 1000)


def bulk(client: Client, name: str, turns: int, seed: int) -> dict[str, float]:
    """Appends the conversation to a new memory, and waits until everything is encoded."""
    client.memories.create(name)
    before = client.admin.usage("default").encoded_tokens
    started = time.perf_counter()
    for lines in _batches(list(conversation(seed, turns)), TURNS_PER_APPEND):
        written = client.memory(name).append([as_turn(line) for line in lines])
    appended_s = time.perf_counter() - started
    wait_encoded(client, name, written.revision)
    seconds = time.perf_counter() - started
    tokens = client.admin.usage("default").encoded_tokens - before
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "append_all_s": round(appended_s, 3),
    }


def through_service(service: Service, turns: int, seed: int) -> dict[str, dict[str, object]]:
    """Once alone, once with a trickle beside it."""
    with service.client() as client:
        _warm(client, seed)
        alone = bulk(client, "bulk", turns, seed)
        client.memories.create("trickle")
        with Trickle(service, pause_s=0.05) as trickle:
            beside = bulk(client, "bulk-again", turns, seed)
    return {
        "alone": {**alone},
        "with_trickle": {**beside, "append_reply_ms": quantiles(trickle.replies_ms)},
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile with the count."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    median = statistics.median(ordered)
    return {"count": len(ordered), "p50": round(median, 2), "p99": round(p99, 2)}


def _warm(client: Client, seed: int) -> None:
    client.memories.create("warm")
    lines = conversation(seed + 1, 200)
    written = client.memory("warm").append([as_turn(line) for line in lines])
    wait_encoded(client, "warm", written.revision)


def wait_encoded(client: Client, memory: str, revision: int) -> None:
    """Returns when every document of the revision is encoded."""
    for progress in client.memory(memory).watch():
        for encoding in progress.encodings:
            assert encoding.state is not EncodingState.FAILED, encoding.failure
            if encoding.encoded_revision >= revision:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(bare(arguments.model, arguments.turns, arguments.seed)))
        return
    first = _bare_apart(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data", arguments.model) as service,
    ):
        whole = through_service(service, arguments.turns, arguments.seed)
    second = _bare_apart(arguments)
    bare_rate = statistics.mean(run["tokens"] / run["seconds"] for run in (first, second))
    rate = whole["alone"]["tokens_per_s"]
    assert isinstance(rate, float)
    figures = {
        "machine": machine(),
        "model": arguments.model,
        "turns": arguments.turns,
        "bare_tokens_per_s": round(bare_rate),
        "ratio": round(rate / bare_rate, 3),
        **whole,
    }
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
