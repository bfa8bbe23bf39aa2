"""One tenant floods the server while another works as always: what the other one notices.

    python -m benchmarks.overload --json

Tenant B asks, appends and reads at a steady pace: alone, then while tenant A sends all
it can (questions, appends, listings, exports over several connections, no refusal
heeded), then alone again. A is a process of its own. No quota is set, so that what
protects B is the server's sharing alone; --quota gives A some. `ratio` is B's 99th
percentile with A over the mean of the two without. The fake engine works at the pace
of a small model, so that the figures are of the service; --model default is the real one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.ingest import as_turn, quantiles, wait_encoded
from benchmarks.machine import machine
from benchmarks.service import Service, running
from benchmarks.workload import conversation
from memsvc.client import NO_RETRIES, ApiError, AsyncClient, Client, Generation, Scope, Turn

FAKE = "fake:step_ms=20,route_ms=5,encode_ms=5"
QUESTIONS = ("Who repaired the blue violin?", "What was lost in Graz?", "Who sold a telescope?")
ANSWER = Generation(max_answer_tokens=16)
MEMORY_TURNS = 200
FLOODED_MEMORIES = 4
#: Calls that A keeps going on each of its connections, by kind.
CALLS = {"ask": 12, "append": 12, "list": 8, "export": 2}
#: Until A is in full swing.
RUN_UP_S = 2.0

Figures = dict[str, dict[str, float]]


class Steady(threading.Thread):
    """One thing that tenant B does again and again, and how long each took."""

    def __init__(self, act: Callable[[int], object], pause_s: float) -> None:
        super().__init__()
        self._act, self._pause_s = act, pause_s
        self._over = threading.Event()
        self.times_ms: list[float] = []
        self.refused = 0

    def stop(self) -> None:
        """Returns when the last one is done."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until `stop`."""
        number = 0
        while not self._over.wait(self._pause_s):
            number += 1
            started = time.perf_counter()
            try:
                self._act(number)
            except ApiError:
                self.refused += 1
            else:
                self.times_ms.append((time.perf_counter() - started) * 1000)


def steady(service: Service, key: str, seconds: float) -> Figures:
    """What B sees in so many seconds. B's client repeats nothing."""
    turns = [as_turn(line) for line in conversation(5, 1000)]
    with Client(service.address, key, retry=NO_RETRIES) as client:
        settled, growing = client.memory("settled"), client.memory("growing")
        work = {
            "ask": Steady(lambda n: settled.ask(QUESTIONS[n % 3], options=ANSWER), 0.05),
            "append": Steady(lambda n: growing.append([turns[n % 1000]]), 0.1),
            "read": Steady(lambda _: client.memories.get("settled"), 0.05),
        }
        for one in work.values():
            one.start()
        time.sleep(seconds)
        for one in work.values():
            one.stop()
    return {name: {**quantiles(one.times_ms), "refused": one.refused} for name, one in work.items()}


async def flood(address: str, key: str, connections: int, seconds: float) -> Counter[str]:
    """Tenant A: every call is followed by the next at once. Returns outcomes by kind."""
    outcomes: Counter[str] = Counter()
    clients = [AsyncClient(address, key, retry=NO_RETRIES) for _ in range(connections)]

    async def again(client: AsyncClient, kind: str, number: int) -> None:
        turns = [as_turn(line) for line in conversation(number, 50)]
        while True:
            try:
                await one(client, kind, number, turns)
                outcomes[f"{kind} OK"] += 1
            except ApiError as error:
                outcomes[f"{kind} {error.reason or error.code}"] += 1

    callers = [
        asyncio.create_task(again(client, kind, number))
        for client in clients
        for kind, times in CALLS.items()
        for number in range(times)
    ]
    await asyncio.sleep(seconds)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    for client in clients:
        await client.close()
    return outcomes


async def one(client: AsyncClient, kind: str, number: int, turns: list[Turn]) -> None:
    """One call of the flood."""
    memory = client.memory(f"flood-{number % FLOODED_MEMORIES}")
    if kind == "ask":
        await memory.ask(QUESTIONS[number % 3], options=ANSWER)
    elif kind == "append":
        await memory.append(turns)
    elif kind == "list":
        await client.memories.list()
    else:
        async for _ in memory.export():
            pass


def prepare(service: Service, quota: Mapping[str, int]) -> dict[str, str]:
    """Two tenants with encoded memories. Returns a key of each."""
    keys = {}
    with service.client() as operator:
        for tenant in ("a-flooding", "b-steady"):
            operator.admin.create_tenant(tenant)
            keys[tenant] = operator.admin.create_api_key(tenant, Scope.READ_WRITE).secret
        if quota:
            operator.admin.set_quotas("a-flooding", quota)
    flooded = [f"flood-{number}" for number in range(FLOODED_MEMORIES)]
    for tenant, memories in (("b-steady", ["settled", "growing"]), ("a-flooding", flooded)):
        with Client(service.address, keys[tenant]) as client:
            for number, memory in enumerate(memories):
                client.memories.create(memory)
                lines = conversation(number, MEMORY_TURNS)
                written = client.memory(memory).append([as_turn(line) for line in lines])
                wait_encoded(client, memory, written.revision)
    return keys


def measure(service: Service, arguments: argparse.Namespace) -> dict[str, object]:
    """Quiet, flooded, quiet."""
    quota = {name: int(value) for name, _, value in (one.partition("=") for one in arguments.quota)}
    keys = prepare(service, quota)
    key, seconds = keys["b-steady"], arguments.seconds
    steady(service, key, RUN_UP_S)
    first = steady(service, key, seconds)
    command = [sys.executable, "-m", "benchmarks.overload", "--flood-of", service.address]
    command += ["--connections", str(arguments.connections), "--seconds", str(seconds + RUN_UP_S)]
    flooding = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert flooding.stdin is not None
    # Not on the command line, which other users of the machine can read.
    flooding.stdin.write(keys["a-flooding"] + "\n")
    flooding.stdin.flush()
    time.sleep(RUN_UP_S)
    flooded = steady(service, key, seconds)
    output, _ = flooding.communicate()
    time.sleep(RUN_UP_S)
    second = steady(service, key, seconds)
    return {
        "quota_of_a": quota,
        "flood": json.loads(output),
        "b": {
            name: {
                "quiet": first[name],
                "flooded": flooded[name],
                "quiet_again": second[name],
                "ratio": ratio(first[name], flooded[name], second[name]),
            }
            for name in first
        },
    }


def ratio(
    first: Mapping[str, float], flooded: Mapping[str, float], second: Mapping[str, float]
) -> float:
    """Of the 99th percentiles."""
    return round(flooded["p99"] / statistics.mean((first["p99"], second["p99"])), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=FAKE)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the three parts")
    parser.add_argument("--connections", type=int, default=4, help="of the flood")
    parser.add_argument(
        "--quota", action="append", default=[], metavar="NAME=VALUE", help="of the flooding tenant"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--flood-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood_of:
        key = sys.stdin.readline().strip()
        outcomes = asyncio.run(
            flood(arguments.flood_of, key, arguments.connections, arguments.seconds)
        )
        print(json.dumps(outcomes))
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data", arguments.model) as service,
    ):
        found = measure(service, arguments)
    figures = {"machine": machine(), "model": arguments.model, **found}
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
