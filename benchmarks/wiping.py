"""What it costs to overwrite all memory as it is freed (wipe_freed_memory).

    python -m benchmarks.wiping --json

Two services, one with the setting and one without, take turns in the order off, on, on,
off, so that a drift of the machine falls on both. Each fills a memory, appends single
turns one after another, and answers questions. `cost` is how much more time the same
work took, as a share: 0.03 is three per cent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.ingest import as_turn, bulk
from benchmarks.machine import machine
from benchmarks.query import QUESTIONS, ask
from benchmarks.service import Service, running
from benchmarks.workload import conversation

ORDER = ("off", "on", "on", "off")


def work(service: Service, turns: int, appends: int, seed: int) -> dict[str, float]:
    """Milliseconds of each kind of work: a thousand tokens, one append, one answer."""
    with service.client() as client:
        bulk(client, "warm", 100, seed + 1)
        ask(client, "warm", QUESTIONS[0])
        filled = bulk(client, "filled", turns, seed)
        single = [as_turn(line) for line in conversation(seed + 2, appends)]
        client.memories.create("single")
        times_ms = []
        for turn in single:
            started = time.perf_counter()
            client.memory("single").append([turn])
            times_ms.append((time.perf_counter() - started) * 1000)
        answers = [ask(client, "filled", question) for question in (*QUESTIONS, *QUESTIONS)]
    return {
        "thousand_tokens_encoded": 1e6 / filled["tokens_per_s"],
        "append": statistics.median(times_ms),
        "first_token": statistics.median(one["first_token_ms"] for one in answers),
        "later_token": statistics.median(one["per_token_ms"] for one in answers),
    }


def compared(runs: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Means of both kinds of service, and the cost."""
    found = {}
    for name in runs["off"][0]:
        off, on = (statistics.mean(run[name] for run in runs[kind]) for kind in ("off", "on"))
        found[name] = {
            "off_ms": round(off, 2),
            "on_ms": round(on, 2),
            "cost": round(on / off - 1, 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--turns", type=int, default=500, help="of the memory that is filled")
    parser.add_argument("--appends", type=int, default=300, help="of single turns")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    for kind in ORDER:
        setting = f"wipe_freed_memory={'true' if kind == 'on' else 'false'}"
        with (
            tempfile.TemporaryDirectory() as folder,
            running(Path(folder) / "data", arguments.model, setting) as service,
        ):
            runs[kind].append(work(service, arguments.turns, arguments.appends, arguments.seed))
    figures = {
        "machine": machine(),
        "model": arguments.model,
        "turns": arguments.turns,
        "milliseconds": compared(runs),
        "runs": runs,
    }
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
