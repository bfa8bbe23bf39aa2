"""What it costs to overwrite all memory as it is freed (wipe_freed_memory).

    python -m benchmarks.wiping --json

Two services run side by side, one with the setting and one without, and take turns: in every
round both do the same work, one right after the other, and the other way round in the next,
so that whatever the machine does besides falls on both. A round appends turns in bulk and
waits for their encoding, appends single turns one after another, and asks questions. Rounds
go on for `--minutes`.

`cost` is how much more time the same work took, as a share: 0.03 is three per cent. It is the
median over the rounds, each compared with itself; `from` and `to` are the quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.ingest import as_turn, bulk, wait_encoded
from benchmarks.machine import machine
from benchmarks.query import QUESTIONS, ask
from benchmarks.service import Service, running
from benchmarks.workload import conversation

KINDS = ("off", "on")
#: A median and quartiles of fewer say nothing.
FEWEST_ROUNDS = 4

#: Milliseconds by kind of work.
Round = dict[str, float]


def work(service: Service, name: str, turns: int, appends: int, seed: int) -> Round:
    """A thousand tokens, one append, one answer's tokens; in memories of that name."""
    with service.client() as client:
        filled = bulk(client, name, turns, seed)
        lines = [as_turn(line) for line in conversation(seed + 1, appends)]
        client.memories.create(f"{name}-single")
        times_ms = []
        for line in lines:
            started = time.perf_counter()
            written = client.memory(f"{name}-single").append([line])
            times_ms.append((time.perf_counter() - started) * 1000)
        wait_encoded(client, f"{name}-single", written.revision)
        answers = [ask(client, name, question) for question in QUESTIONS[:3]]
    return {
        "thousand_tokens_encoded": 1e6 / filled["tokens_per_s"],
        "append": statistics.median(times_ms),
        "first_token": statistics.median(one["first_token_ms"] for one in answers),
        "later_token": statistics.median(one["per_token_ms"] for one in answers),
    }


def compared(runs: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, float]]:
    """Medians of both, and the cost, by kind of work. runs: rounds in order, by setting."""
    found = {}
    for name in runs["off"][0]:
        pairs = [(off[name], on[name]) for off, on in zip(runs["off"], runs["on"], strict=True)]
        low, cost, high = statistics.quantiles([on / off - 1 for off, on in pairs], n=4)
        found[name] = {
            "off_ms": round(statistics.median(off for off, _ in pairs), 2),
            "on_ms": round(statistics.median(on for _, on in pairs), 2),
            "cost": round(cost, 3),
            "from": round(low, 3),
            "to": round(high, 3),
        }
    return found


def rounds(
    services: Mapping[str, Service], until: float, turns: int, appends: int, seed: int
) -> dict[str, list[Round]]:
    """until: time.monotonic() at which no further round begins."""
    for service in services.values():  # Not counted: the first of everything is slow.
        work(service, "warm", min(turns, 50), min(appends, 20), seed)
    runs: dict[str, list[Round]] = {kind: [] for kind in KINDS}
    number = 0
    while number < FEWEST_ROUNDS or time.monotonic() < until:
        number += 1
        for kind in KINDS if number % 2 else reversed(KINDS):
            name = f"round-{number}"
            runs[kind].append(work(services[kind], name, turns, appends, seed + 10 * number))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--minutes", type=float, default=3.5, help="that rounds go on")
    parser.add_argument("--turns", type=int, default=120, help="appended in bulk in a round")
    parser.add_argument("--appends", type=int, default=100, help="of single turns in a round")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        services = {}
        for kind in KINDS:
            setting = f"wipe_freed_memory={'true' if kind == 'on' else 'false'}"
            started = running(folder / kind, arguments.model, setting)
            services[kind] = stack.enter_context(started)
        until = time.monotonic() + arguments.minutes * 60
        runs = rounds(services, until, arguments.turns, arguments.appends, arguments.seed)
    figures = {
        "machine": machine(),
        "model": arguments.model,
        "rounds": len(runs["off"]),
        "turns": arguments.turns,
        "appends": arguments.appends,
        "milliseconds": compared(runs),
        "runs": runs,
    }
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
