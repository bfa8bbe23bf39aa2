"""One tenant floods the server while another works as always: what the other one notices.

    python -m benchmarks.overload --json

Tenant B asks, appends and reads at a steady pace, four times in one run: alone; while
tenant A sends all it can (questions, appends, listings, exports over several connections,
no refusal heeded); while A's calls go at the same rate to a port that has nothing to do
with the server; and, once A's memories are deleted, alone again. `ratio` is B's 99th percentile
with A over that of both quiet parts together; `control` is the same for the unrelated port:
what A's client alone costs B on this machine. A is a process of its own that steps back for
the others (--nice), as if it ran on another machine. `cores` is how much of a core each
process used. No quota
is set, so that what protects B is the server's sharing alone; --quota gives A some. The
fake engine works at the pace of a small model, so that the figures are of the service;
--model default is the real one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
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

Times = Mapping[str, list[float]]
#: Parts of an answer's time that the worker tells, in milliseconds.
PARTS = ("queue_ms", "page_in_ms", "routing_ms", "time_to_first_token_ms", "total_ms")


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
    parts = {part: median(getattr(one, part) for one in usage) for part in PARTS}
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


def prepare(service: Service, quota: Mapping[str, int]) -> dict[str, str]:
    """Two tenants with encoded memories. Returns a key of each."""
    keys = {}
    with service.client() as operator:
        for tenant in ("a-flooding", "b-steady"):
            operator.admin.create_tenant(tenant)
            keys[tenant] = operator.admin.create_api_key(tenant, Scope.READ_WRITE).secret
        if quota:
            operator.admin.set_quotas("a-flooding", quota)
    for tenant, memories in (
        ("b-steady", ["settled", "growing"]),
        ("a-flooding", flooding.MEMORIES),
    ):
        with Client(service.address, keys[tenant]) as client:
            for number, memory in enumerate(memories):
                client.memories.create(memory)
                lines = conversation(number, MEMORY_TURNS)
                written = client.memory(memory).append([as_turn(line) for line in lines])
                wait_encoded(client, memory, written.revision)
    return keys


def calm(service: Service, keys: Mapping[str, str]) -> None:
    """Takes away what A left behind: its texts would be encoded for minutes."""
    with Client(service.address, keys["a-flooding"]) as client:
        for memory in flooding.MEMORIES:
            client.memories.delete(memory, allow_missing=True)
    time.sleep(RUN_UP_S)


def measure(service: Service, arguments: argparse.Namespace) -> dict[str, object]:
    """Quiet, flooded, flooded elsewhere, quiet."""
    quota = {name: int(value) for name, _, value in (one.partition("=") for one in arguments.quota)}
    keys = prepare(service, quota)
    key = keys["b-steady"]
    steady(service, key, RUN_UP_S)
    first, quiet = steady(service, key, arguments.seconds)
    with_a, flood = flooded(service, keys, arguments)
    calm(service, keys)
    elsewhere, control = flooded(service, keys, arguments, rate=flood["calls_per_s"])
    calm(service, keys)
    second, quiet_again = steady(service, key, arguments.seconds)
    return {
        "quota_of_a": quota,
        "quiet": quiet,
        "quiet_again": quiet_again,
        "flood": flood,
        "elsewhere": control,
        "b": {name: compared(name, first, with_a, elsewhere, second) for name in first},
    }


def compared(
    name: str, first: Times, with_a: Times, elsewhere: Times, second: Times
) -> dict[str, object]:
    """Percentiles of one kind of call, and ratios of the 99th."""
    quiet = quantiles([*first[name], *second[name]])
    flood, control = quantiles(with_a[name]), quantiles(elsewhere[name])
    return {
        "quiet_first": quantiles(first[name]),
        "quiet_again": quantiles(second[name]),
        "quiet": quiet,
        "flooded": flood,
        "elsewhere": control,
        "ratio": round(flood["p99"] / quiet["p99"], 2),
        "ratio_p50": round(flood["p50"] / quiet["p50"], 2),
        "control": round(control["p99"] / quiet["p99"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=FAKE)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the four parts")
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
