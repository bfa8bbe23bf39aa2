"""A memory moves to another model while it is asked and appended to.

    python -m benchmarks.reencode --json

A memory of --tokens tokens of generated conversation is encoded under --old. Clients ask and
append at a steady pace: for a while with nothing else going on (`quiet`), then while it is
re-encoded under --new (`moving`), which takes over when it is complete, then on (`moved`).
Counted are questions that failed, and answers of the old model to questions asked after the
new one was seen to have taken over: both must be 0. `p99_ratio` is moving over quiet, of whole
answers, `append_p99_ratio` of appends of one turn; the same calls at the same pace, in one run.

--kill server,worker kills each with SIGKILL on the way and starts it again. `redone` counts
documents that the new model encoded again though they were known to be done when something
was killed: it must be 0. `encoded_twice` counts those that were on their way. Questions that
fail while the killed one is down are counted apart; clients repeat what they can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from benchmarks.counting import CountingProxy
from benchmarks.ingest import TURNS_PER_APPEND, as_turn, quantiles
from benchmarks.machine import machine
from benchmarks.processes import ServerProcess, WorkerProcess
from benchmarks.workload import Line, conversation
from memsvc.client import (
    NO_RETRIES,
    AsyncClient,
    Encoding,
    Generation,
    Memory,
    MemsvcError,
    Progress,
    RetryPolicy,
)

MEMORY = "moving"
QUESTIONS = ("Who repaired the blue violin?", "What was lost in Graz?", "Who sold a telescope?")
ANSWER = Generation(max_answer_tokens=16)
KILLS = ("worker", "server")
#: While something is killed on purpose, a client that gives up at once measures nothing.
PATIENT = RetryPolicy(attempts=100, initial_s=0.05, ceiling_s=0.5)
_LOOK_S = 0.05


@dataclass(frozen=True)
class Options:
    """tokens: of the memory, at least. kill: what dies on the way. questions: asked before and
    after. askers, pause_s, append_s: of the steady load. threads: of each worker; 0: all cores.
    settings: of the server.
    """

    tokens: int = 100_000
    old: str = "default"
    new: str = "default:pool_tokens=32"
    kill: Sequence[str] = ()
    questions: int = 200
    askers: int = 2
    pause_s: float = 0.05
    append_s: float = 0.5
    threads: int = 0
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """One question or append. model: who answered; empty when it failed with `error`."""

    began: float
    ended: float
    model: str
    error: str = ""


@dataclass
class Load:
    """Clients that ask and append until they are stopped."""

    client: AsyncClient
    options: Options
    lines: list[Line]
    asked: list[Asked] = field(default_factory=list)
    appends: list[Asked] = field(default_factory=list)
    appended: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Begins."""
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(self.options.askers)]
        self._tasks.append(asyncio.create_task(self._append()))

    async def stop(self) -> None:
        """Ends. Raises what an append raised."""
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def more(self, count: int) -> None:
        """Returns when so many more questions, asked from now on, have an answer or failed."""
        since = time.monotonic()
        while sum(one.began >= since for one in self.asked) < count:
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(_LOOK_S)

    async def _ask(self, number: int) -> None:
        while True:
            number += 1
            began = time.monotonic()
            question = QUESTIONS[number % len(QUESTIONS)]
            model = error = ""
            try:
                answer = await self.client.memory(MEMORY).ask(question, options=ANSWER)
                model = answer.done.model
            except MemsvcError as failure:
                error = getattr(failure, "reason", "") or type(failure).__name__
            self.asked.append(Asked(began, time.monotonic(), model, error))
            await asyncio.sleep(self.options.pause_s)

    async def _append(self) -> None:
        while True:
            turn = as_turn(self.lines[self.appended % len(self.lines)])
            began = time.monotonic()
            await self.client.memory(MEMORY).append([turn])
            self.appends.append(Asked(began, time.monotonic(), ""))
            self.appended += 1
            await asyncio.sleep(self.options.append_s)


@dataclass
class Move:
    """What happened on the way. Times of time.monotonic()."""

    began: float
    ended: float = 0.0
    #: Of each kill: when, until when the killed one was down, and the highest number done before.
    kills: list[tuple[float, float, int]] = field(default_factory=list)

    def down(self, one: Asked) -> bool:
        """Whether a question overlaps with the time that something was down."""
        return any(one.began <= until and one.ended >= at for at, until, _ in self.kills)


class Stage:
    """All processes of one run in `folder`: two workers, the proxy before one, the server."""

    def __init__(self, folder: Path, options: Options) -> None:
        data = folder / "data"
        sockets = [f"unix:{folder / name}.sock" for name in ("old", "new", "counted")]
        self.old = WorkerProcess(data, options.old, sockets[0], options.threads)
        self.new = WorkerProcess(data, options.new, sockets[1], options.threads)
        self.proxy = CountingProxy(sockets[2], sockets[1])
        workers = f"{sockets[0]},{sockets[2]}"
        self.server = ServerProcess(data, workers, options.settings)

    async def start(self, stack: AsyncExitStack) -> None:
        """Starts all of it; `stack` stops it."""
        for process in (self.old, self.new, self.server):
            stack.callback(process.stop)
            await asyncio.to_thread(process.start)
        await self.proxy.start()
        stack.push_async_callback(self.proxy.stop)

    def kill(self, what: str) -> None:
        """SIGKILL, and started again; blocks until it serves."""
        process = self.server if what == "server" else self.new
        process.kill()
        process.start()


async def fill(client: AsyncClient, tokens: int, old: str) -> Memory:
    """The memory with at least so many tokens, encoded under the old model."""
    await client.memories.create(MEMORY)
    lines, turns = conversation(11, 10_000_000), TURNS_PER_APPEND
    while True:
        written = await client.memory(MEMORY).append([as_turn(x) for x in islice(lines, turns)])
        async for progress in client.memory(MEMORY).watch():
            if under(progress, old).encoded_revision >= written.revision:
                break
        found = await client.memories.get(MEMORY)
        encoded = under(found, old)
        if encoded.tokens >= tokens:
            return found
        per_turn = encoded.tokens / found.document_count
        turns = min(TURNS_PER_APPEND, int((tokens - encoded.tokens) / per_turn) + 1)


async def models(client: AsyncClient) -> tuple[str, str]:
    """Names of the old model, which is the default, and of the new one, both served."""
    while True:
        found = (await client.models.list()).items
        if len(found) >= 2 and all(model.state == "serving" for model in found):
            old = next(model.name for model in found if model.default_model)
            return old, next(model.name for model in found if model.name != old)
        await asyncio.sleep(_LOOK_S)


def under(memory: Memory | Progress, model: str) -> Encoding:
    """The memory's encoding under a model."""
    return next(one for one in memory.encodings if one.model == model)


async def move(client: AsyncClient, stage: Stage, new: str, kill: Sequence[str]) -> Move:
    """Attaches the new model and returns when it answers; kills on the way."""
    done = Move(time.monotonic())
    await client.models.attach(MEMORY, new, make_default=True)
    while True:
        memory = await client.memories.get(MEMORY)
        if memory.default_model == new:
            done.ended = time.monotonic()
            return done
        # Nothing is deleted, so numbers up to the watermark are those that are encoded.
        encoded = under(memory, new).encoded_documents
        if len(done.kills) < len(kill):
            share = (len(done.kills) + 1) / (len(kill) + 1)
            if encoded >= share * memory.document_count:
                began = time.monotonic()
                await asyncio.to_thread(stage.kill, kill[len(done.kills)])
                done.kills.append((began, time.monotonic(), encoded))
        await asyncio.sleep(_LOOK_S)


def by_phase(calls: Sequence[Asked], moved: Move) -> dict[str, list[Asked]]:
    """Calls that ended before the move, those that overlap with it, and those begun after it."""
    parts: dict[str, list[Asked]] = {"quiet": [], "moving": [], "moved": []}
    for one in calls:
        when = "moved" if one.began >= moved.ended else "moving"
        parts["quiet" if one.ended <= moved.began else when].append(one)
    return parts


def milliseconds(parts: Mapping[str, Sequence[Asked]]) -> dict[str, dict[str, float]]:
    """Quantiles of each phase, failed calls left out; nothing for one without calls."""
    return {
        name: quantiles([(one.ended - one.began) * 1000 for one in part if not one.error])
        for name, part in parts.items()
        if part
    }


def p99_ratio(times: Mapping[str, Mapping[str, float]]) -> float | None:
    """Moving over quiet; None where there was nothing to compare."""
    if "moving" not in times or "quiet" not in times:
        return None
    return round(times["moving"]["p99"] / times["quiet"]["p99"], 2)


def figures(load: Load, moved: Move, stage: Stage, old: str, new: str) -> dict[str, object]:
    """What the run came to."""
    parts, appends = by_phase(load.asked, moved), by_phase(load.appends, moved)
    failed = [one for one in load.asked if one.error]
    times, append_times = milliseconds(parts), milliseconds(appends)
    counts = Counter(one.number for one in stage.proxy.encoded)
    redone = [
        one.number
        for one in stage.proxy.encoded
        if any(one.at > at and one.number <= done for at, _, done in moved.kills)
    ]
    return {
        "questions": {name: len(part) for name, part in parts.items()},
        "appends": load.appended,
        "failed": sum(not moved.down(one) for one in failed),
        "failed_while_down": sum(moved.down(one) for one in failed),
        "failures": dict(Counter(one.error for one in failed)),
        "answers_of_the_old_model_after": sum(one.model == old for one in parts["moved"]),
        "answers_of_the_new_model_after": sum(one.model == new for one in parts["moved"]),
        "move_s": round(moved.ended - moved.began, 1),
        "ms": times,
        "p99_ratio": p99_ratio(times),
        "append_ms": append_times,
        "append_p99_ratio": p99_ratio(append_times),
        "kills": len(moved.kills),
        "done_at_kills": [done for _, _, done in moved.kills],
        "encoded": len(stage.proxy.encoded),
        "encoded_twice": sum(counts.values()) - len(counts),
        "redone": len(redone),
    }


async def measure(folder: Path, options: Options) -> dict[str, object]:
    """One run in an empty folder."""
    async with AsyncExitStack() as stack:
        stage = Stage(folder, options)
        await stage.start(stack)
        policy = PATIENT if options.kill else NO_RETRIES
        address, key = stage.server.address, stage.server.api_key
        client = await stack.enter_async_context(AsyncClient(address, key, retry=policy))
        old, new = await models(client)
        filled = await fill(client, options.tokens, old)
        load = Load(client, options, list(conversation(12, 1000)))
        load.start()
        # The first ones page in.
        await load.more(options.askers)
        load.asked.clear()
        load.appends.clear()
        await load.more(options.questions)
        moved = await move(client, stage, new, options.kill)
        await load.more(options.questions)
        await load.stop()
        tokens = {"tokens": filled.encodings[0].tokens, "documents": filled.document_count}
        return tokens | figures(load, moved, stage, old, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=Options.tokens)
    parser.add_argument("--old", default=Options.old)
    parser.add_argument("--new", default=Options.new)
    parser.add_argument("--kill", default="", help="server, worker, or both with a comma")
    parser.add_argument("--questions", type=int, default=Options.questions)
    parser.add_argument("--threads", type=int, default=Options.threads, help="0: all cores each")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    kill = tuple(filter(None, given.kill.split(",")))
    if not set(kill) <= set(KILLS):
        parser.error(f"--kill takes {' and '.join(KILLS)}")
    options = Options(
        given.tokens,
        given.old,
        given.new,
        kill,
        given.questions,
        threads=given.threads,
        settings=tuple(given.set),
    )
    with tempfile.TemporaryDirectory(prefix="memsvc-reencode-") as folder:
        found = asyncio.run(measure(Path(folder), options))
    told = {"machine": machine(), "old": options.old, "new": options.new, **found}
    print(json.dumps(told) if given.json else json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
