"""A tenant that floods, for benchmarks.overload: a process of its own, and a port to flood in vain.

    python -m benchmarks.flooding ADDRESS --connections 4 --seconds 20 [--rate N] [--nice N]

The tenant's key comes on standard input. Prints one JSON object: outcomes by kind of call,
and how much of a core the process used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio

from benchmarks.ingest import as_turn
from benchmarks.workload import conversation
from memsvc.client import NO_RETRIES, ApiError, AsyncClient, Generation, Turn

QUESTIONS = ("Who repaired the blue violin?", "What was lost in Graz?", "Who sold a telescope?")
ANSWER = Generation(max_answer_tokens=8)
#: Memories that it floods.
MEMORIES = [f"flood-{number}" for number in range(4)]
#: Calls that it keeps going on each of its connections, by kind.
CALLS = {"ask": 12, "append": 12, "list": 8, "export": 2}
#: Address that stands for a port of the process's own, where every call is refused at once.
NOWHERE = "nowhere"


class Pace:
    """At most so many calls a second. 0: any number."""

    def __init__(self, rate: float) -> None:
        self._pause_s = 1 / rate if rate else 0.0
        self._next = time.monotonic()

    async def wait(self) -> None:
        """Returns when the next call may go."""
        if self._pause_s:
            now = time.monotonic()
            self._next = max(self._next + self._pause_s, now - 1)
            await asyncio.sleep(self._next - now)


async def flood(
    address: str, key: str, connections: int, seconds: float, pace: Pace
) -> Counter[str]:
    """Every call is followed by the next as soon as the pace allows. Returns outcomes by kind."""
    outcomes: Counter[str] = Counter()
    clients = [AsyncClient(address, key, retry=NO_RETRIES) for _ in range(connections)]

    async def again(client: AsyncClient, kind: str, number: int) -> None:
        turns = [as_turn(line) for line in conversation(number, 50)]
        while True:
            await pace.wait()
            try:
                await _one(client, kind, number, turns)
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


async def _one(client: AsyncClient, kind: str, number: int, turns: list[Turn]) -> None:
    memory = client.memory(MEMORIES[number % len(MEMORIES)])
    if kind == "ask":
        await memory.ask(QUESTIONS[number % len(QUESTIONS)], options=ANSWER)
    elif kind == "append":
        await memory.append(turns)
    elif kind == "list":
        await client.memories.list()
    else:
        async for _ in memory.export():
            pass


class _Refusing(grpc.GenericRpcHandler):
    """Takes every call there is, and refuses it."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def refuse(_: bytes, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody is here")

        return grpc.unary_unary_rpc_method_handler(refuse)


@asynccontextmanager
async def nowhere() -> AsyncIterator[str]:
    """The address of a server that refuses everything."""
    server = aio.server()
    server.add_generic_rpc_handlers((_Refusing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def run(arguments: argparse.Namespace, key: str) -> dict[str, object]:
    """Floods, and says what came of it."""
    before, pace = os.times(), Pace(arguments.rate)
    connections, seconds = arguments.connections, arguments.seconds
    if arguments.address == NOWHERE:
        async with nowhere() as address:
            outcomes = await flood(address, key, connections, seconds, pace)
    else:
        outcomes = await flood(arguments.address, key, connections, seconds, pace)
    after = os.times()
    used_s = after.user + after.system - before.user - before.system
    return {
        "calls": outcomes,
        "calls_per_s": round(outcomes.total() / seconds, 1),
        "cores": round(used_s / (after.elapsed - before.elapsed), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help=f"of the server; {NOWHERE}: a port of its own")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=0.0, help="calls a second; 0: all it can")
    parser.add_argument("--nice", type=int, default=0, help="how far it steps back for others")
    arguments = parser.parse_args()
    os.nice(arguments.nice)
    print(json.dumps(asyncio.run(run(arguments, sys.stdin.readline().strip()))))


if __name__ == "__main__":
    main()
