"""One tenant floods the server while another works as always: what the other one notices.

    python -m benchmarks.overload --json

Tenant B asks, appends and reads at a steady pace, in rounds of five parts:

    quiet      alone
    flood      while tenant A sends all it can (questions, appends, listings, exports over
               several connections, no refusal heeded)
    elsewhere  while A's calls go at the same rate to a port that has nothing to do with the
               server: what A's client alone costs B on this machine
    burners    the same, and beside it a process that never talks to the server takes as much
               processor time as server and worker took for A, in as many bursts
    again      alone, once A's memories are deleted

`ratio` is B's 99th percentile with A over that of both quiet parts, `elsewhere_ratio` and
`burners_ratio` are the same for those parts. What the burners cost B is the machine's: on other
cores it would cost nothing, and no server could spare B of it. Percentiles are of all rounds
together; `rounds` has the ratios of each. A is a process of its own that steps back for the
others (--nice), as if it ran on another machine. `cores` is how much of a core each process
used, mean of the rounds. No quota is set, so that what protects B is the server's sharing
alone; --quota gives A some. The fake engine works at the pace of a small model, so that the
figures are of the service; --model default is the real one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

from benchmarks import flooding
from benchmarks.ingest import as_turn, quantiles, wait_encoded
from benchmarks.machine import machine
from benchmarks.service import Service, running
from benchmarks.workload import conversation
from memsvc.client import NO_RETRIES, Client, Scope, Usage

FAKE = "fake:step_ms=20,route_ms=5,encode_ms=5"
MEMORY_TURNS = 200
#: Until A is in full swing.
RUN_UP_S = 2.0
QUIET = ("quiet", "again")
PARTS = ("quiet", "flood", "elsewhere", "burners", "again")

Times = Mapping[str, list[float]]
#: Parts of an answer's time that the worker tells, in milliseconds.
ANSWER_PARTS = ("queue_ms", "page_in_ms", "routing_ms", "time_to_first_token_ms", "total_ms")


class Steady(threading.Thread):
    """One thing that tenant B does again and again, and how long each took.

    It begins each `pause_s` after the last one ended.
    """

    def __init__(self, act: Callable[[int], object], pause_s: float) -> None:
        super().__init__()
        self._act, self._pause_s = act, pause_s
        self._over = threading.Event()
        self.times_ms: list[float] = []

    def stop(self) -> None:
        """Returns when the last one is done."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until `stop`. B is never refused: an error ends the benchmark."""
        number = 0
        while not self._over.wait(self._pause_s):
            number += 1
            started = time.perf_counter()
            self._act(number)
            self.times_ms.append((time.perf_counter() - started) * 1000)


class Cores:
    """How much of a core each process of the service uses."""

    def __init__(self, server: int) -> None:
        process = psutil.Process(server)
        self._processes = {"server": process, "worker": process.children()[0]}
        self._began = self._now()

    def _now(self) -> dict[str, tuple[float, float]]:
        times = {name: one.cpu_times() for name, one in self._processes.items()}
        return {name: (time.monotonic(), t.user + t.system) for name, t in times.items()}

    def used(self) -> dict[str, float]:
        """Since this was made."""
        return {
            name: round((used - self._began[name][1]) / (at - self._began[name][0]), 2)
            for name, (at, used) in self._now().items()
        }


def steady(service: Service, key: str, seconds: float) -> tuple[Times, dict[str, Any]]:
    """What B sees in so many seconds, and how much the service used. B repeats nothing."""
    usage: list[Usage] = []
    turns = [as_turn(line) for line in conversation(5, 1000)]
    with Client(service.address, key, retry=NO_RETRIES) as client:
        settled, growing = client.memory("settled"), client.memory("growing")

        def ask(number: int) -> None:
            question = flooding.QUESTIONS[number % len(flooding.QUESTIONS)]
            answer = settled.ask(question, options=flooding.ANSWER)
            assert answer.usage is not None
            usage.append(answer.usage)

        work = {
            "ask": Steady(ask, 0.05),
            "append": Steady(lambda n: growing.append([turns[n % 1000]]), 0.1),
            "read": Steady(lambda _: client.memories.get("settled"), 0.05),
        }
        cores = Cores(service.process)
        for one in work.values():
            one.start()
        time.sleep(seconds)
        for one in work.values():
            one.stop()
    parts = {part: median(getattr(one, part) for one in usage) for part in ANSWER_PARTS}
    answers = {name: round(value, 1) for name, value in parts.items()}
    return {name: one.times_ms for name, one in work.items()}, {
        "cores": cores.used(),
        "answers_p50": answers,
    }


def flooded(
    service: Service, keys: Mapping[str, str], arguments: argparse.Namespace, rate: float = 0.0
) -> tuple[Times, dict[str, Any]]:
    """What B sees while A floods; with a rate, while A does so elsewhere."""
    address = flooding.NOWHERE if rate else service.address
    command = [sys.executable, "-m", "benchmarks.flooding", address, "--rate", str(rate)]
    command += ["--connections", str(arguments.connections), "--nice", str(arguments.nice)]
    command += ["--seconds", str(arguments.seconds + 2 * RUN_UP_S)]
    # The key not on the command line, which other users of the machine can read.
    flood = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert flood.stdin is not None
    flood.stdin.write(keys["a-flooding"] + "\n")
    flood.stdin.flush()
    time.sleep(RUN_UP_S)
    seen, told = steady(service, keys["b-steady"], arguments.seconds)
    output, _ = flood.communicate()
    report: dict[str, Any] = json.loads(output)
    return seen, {**report, **told, "cores": {"flood": report["cores"], **told["cores"]}}


@contextmanager
def burning(cores: float, per_s: float, seconds: float) -> Iterator[dict[str, Any]]:
    """A burner beside the block. Its report is in what is given, once the block has ended."""
    command = [sys.executable, "-m", "benchmarks.burning", "--cores", str(cores)]
    command += ["--per-second", str(per_s), "--seconds", str(seconds)]
    burner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = {}
    yield report
    output, _ = burner.communicate()
    report.update(json.loads(output))


def prepare(service: Service, quota: Mapping[str, int]) -> dict[str, str]:
    """Two tenants, B with encoded memories. Returns a key of each."""
    keys = {}
    with service.client() as operator:
        for tenant in ("a-flooding", "b-steady"):
            operator.admin.create_tenant(tenant)
            keys[tenant] = operator.admin.create_api_key(tenant, Scope.READ_WRITE).secret
        if quota:
            operator.admin.set_quotas("a-flooding", quota)
    fill(service, keys["b-steady"], ["settled", "growing"])
    return keys


def fill(service: Service, key: str, memories: Sequence[str]) -> None:
    """Makes memories, and returns when they are encoded."""
    with Client(service.address, key) as client:
        for number, memory in enumerate(memories):
            client.memories.create(memory)
            lines = conversation(number, MEMORY_TURNS)
            written = client.memory(memory).append([as_turn(line) for line in lines])
            wait_encoded(client, memory, written.revision)


def calm(service: Service, key: str) -> None:
    """Takes away what A left behind: its texts would be encoded for minutes."""
    with Client(service.address, key) as client:
        for memory in flooding.MEMORIES:
            client.memories.delete(memory, allow_missing=True)
    time.sleep(RUN_UP_S)


def one_round(
    service: Service, keys: Mapping[str, str], arguments: argparse.Namespace
) -> dict[str, tuple[Times, dict[str, Any]]]:
    """What B saw in each part, and what was told of it."""
    key, seconds = keys["b-steady"], arguments.seconds
    parts = {"quiet": steady(service, key, seconds)}
    fill(service, keys["a-flooding"], flooding.MEMORIES)
    parts["flood"] = flooded(service, keys, arguments)
    calm(service, keys["a-flooding"])
    rate = parts["flood"][1]["calls_per_s"]
    parts["elsewhere"] = flooded(service, keys, arguments, rate)
    quiet, flood = parts["quiet"][1]["cores"], parts["flood"][1]["cores"]
    extra = max(0.01, sum(flood[name] - used for name, used in quiet.items()))
    with burning(extra, rate, seconds + 2 * RUN_UP_S) as burner:
        seen, told = flooded(service, keys, arguments, rate)
    told["cores"]["burner"] = burner["cores"]
    parts["burners"] = seen, told
    parts["again"] = steady(service, key, seconds)
    return parts


def measure(service: Service, arguments: argparse.Namespace) -> dict[str, object]:
    """All rounds: what B saw, and what was told of each part."""
    quota = {name: int(value) for name, _, value in (one.partition("=") for one in arguments.quota)}
    keys = prepare(service, quota)
    steady(service, keys["b-steady"], RUN_UP_S)
    rounds = [one_round(service, keys, arguments) for _ in range(arguments.rounds)]
    seen = [{name: times for name, (times, _) in parts.items()} for parts in rounds]
    return {
        "quota_of_a": quota,
        "b": {kind: compared(kind, seen) for kind in seen[0]["quiet"]},
        "parts": {name: [parts[name][1] for parts in rounds] for name in PARTS},
        "cores": {name: mean([parts[name][1]["cores"] for parts in rounds]) for name in PARTS},
    }


def mean(cores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By process."""
    return {name: round(fmean(one[name] for one in cores), 2) for name in cores[0]}


def compared(kind: str, rounds: Sequence[Mapping[str, Times]]) -> dict[str, object]:
    """Percentiles of one kind of call by part, and ratios to the quiet parts."""
    together: dict[str, list[float]] = defaultdict(list)
    for one in rounds:
        for part in PARTS:
            together["quiet" if part in QUIET else part] += one[part][kind]
    found: dict[str, Any] = {part: quantiles(times) for part, times in together.items()}
    return {
        **found,
        "ratio": _ratio(found, "flood"),
        "ratio_p50": _ratio(found, "flood", "p50"),
        "elsewhere_ratio": _ratio(found, "elsewhere"),
        "burners_ratio": _ratio(found, "burners"),
        "rounds": [compared(kind, [one])["ratio"] for one in rounds] if len(rounds) > 1 else [],
    }


def _ratio(found: Mapping[str, Mapping[str, float]], part: str, quantile: str = "p99") -> float:
    return round(found[part][quantile] / found["quiet"][quantile], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=FAKE)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the five parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=4, help="of the flood")
    parser.add_argument("--nice", type=int, default=10, help="of the flood's process")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE of the server")
    parser.add_argument(
        "--quota", action="append", default=[], metavar="NAME=VALUE", help="of the flooding tenant"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data", arguments.model, *arguments.set) as service,
    ):
        found = measure(service, arguments)
    figures = {"machine": machine(), "model": arguments.model, **found}
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
