"""Kills the server, or its worker, at random moments while clients write; nothing may be lost.

    python -m tests.fault.crash_loop --kills 200 [--target server|worker|both]
        [--engine fake] [--seed N] [--json]

Writers append turns without pause, several to a memory, and repeat an append
with its request_id until it is acknowledged; one in five is given up instead, and
may then be there once or not at all. At intervals and at the end, every
acknowledged turn must be there exactly once and in order, `check` must be clean,
and each memory must answer from all its documents.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from memsvc.check import Severity, check_data
from memsvc.client import (
    AsyncClient,
    Conversation,
    MemsvcError,
    RetryPolicy,
)
from memsvc.config import load_config
from tests.fault.ledger import Ledger, Stored, problems
from tests.fault.writer import Figures, Writer
from tests.support.live import LiveServer, LiveWorker

#: One try a call: the writers repeat by themselves, and must know what was acknowledged.
_ONE_TRY = RetryPolicy(attempts=1)
_PATIENT = RetryPolicy(attempts=12, initial_s=0.05, ceiling_s=1.0)
_ANSWER_S = 90.0
_KILLED_STARTING_SHARE = 0.15
#: A server starts a worker that dies often ever more slowly, up to 30 s; one that is stopped
#: and started again begins anew.
_KILLS_BETWEEN_DRAINS = 5


class CrashLoopError(AssertionError):
    """Something was lost, doubled or damaged, or does not work any more."""


@dataclass
class Options:
    """target: server, worker or both. Times in seconds."""

    kills: int = 200
    target: str = "server"
    engine: str = "fake"
    seed: int = 0
    memories: int = 3
    writers: int = 2
    verify_every: int = 25
    most_acks_between_kills: int = 30
    longest_life_s: float = 3.0


class CrashLoop:
    """One run: server, writers, killer and judge."""

    def __init__(self, options: Options, server: LiveServer) -> None:
        self._options = options
        self._server = server
        self._rng = random.Random(options.seed)
        self.figures = Figures()
        self._ledgers: list[Ledger] = []
        self._started_s = 1.0
        self._acked = asyncio.Event()

    async def run(self) -> Figures:
        """Raises CrashLoopError."""
        started = time.monotonic()
        await self._start()
        self._ledgers = await self._create()
        done = 0
        while done < self._options.kills:
            burst = min(self._options.verify_every, self._options.kills - done)
            await self._burst(burst)
            done += burst
            await self._verify()
            sys.stderr.write(f"{done} kills, {self.figures.turns_stored} turns, all sound\n")
        self.figures.turns_acked = sum(ledger.acknowledged for ledger in self._ledgers)
        self.figures.seconds = round(time.monotonic() - started, 1)
        return self.figures

    def _client(self, policy: RetryPolicy) -> AsyncClient:
        return AsyncClient(self._server.address, self._server.api_key, retry=policy)

    async def _start(self) -> None:
        begun = time.monotonic()
        await asyncio.to_thread(self._server.start)
        self._started_s = time.monotonic() - begun

    async def _create(self) -> list[Ledger]:
        names = [f"memory-{number}" for number in range(self._options.memories)]
        async with self._client(_PATIENT) as client:
            for name in names:
                await client.memories.create(name)
        writers = range(self._options.writers)
        return [Ledger(name, f"{name}-w{writer}") for name in names for writer in writers]

    async def _burst(self, kills: int) -> None:
        """Kills under writers; when it returns the server is up and no append is in flight."""
        pause = asyncio.Event()
        # A server that lives on takes far more writes than are worth reading back.
        pause_s = 0.0 if self._options.target == "server" else 0.2
        async with self._client(_ONE_TRY) as client, asyncio.TaskGroup() as group:
            for number, ledger in enumerate(self._ledgers):
                rng = random.Random(self._rng.random() + number)
                writer = Writer(ledger, rng, self.figures, self._acked, pause_s)
                group.create_task(writer.run(client, pause))
            for _ in range(kills):
                await self._live()
                if self._next_target() == "worker":
                    await self._kill_worker()
                else:
                    await self._kill_server()
            pause.set()

    async def _live(self) -> None:
        """Lets the writers do a random amount of work, then a moment more."""
        goal = self.figures.appends_acked + self._rng.randint(
            0, self._options.most_acks_between_kills
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(self._options.longest_life_s):
                while self.figures.appends_acked < goal:
                    await self._acked.wait()
                    self._acked.clear()
        await asyncio.sleep(self._rng.uniform(0.0, 0.01))

    def _next_target(self) -> str:
        target = self._options.target
        return self._rng.choice(("server", "worker")) if target == "both" else target

    async def _kill_server(self) -> None:
        await asyncio.to_thread(self._server.kill)
        self.figures.kills_server += 1
        # Starting is work too: reconciling must survive its own death.
        while self._rng.random() < _KILLED_STARTING_SHARE:
            self._server.spawn()
            await asyncio.sleep(self._rng.uniform(0.3, 1.0) * self._started_s)
            await asyncio.to_thread(self._server.kill)
            self.figures.kills_while_starting += 1
        await self._start()

    async def _kill_worker(self) -> None:
        """Kills a worker that serves, or now and then one that starts; another follows."""
        if self._rng.random() > _KILLED_STARTING_SHARE:
            await asyncio.to_thread(self._server.wait_model)
            await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        else:
            self.figures.kills_while_starting += 1
        end = time.monotonic() + _ANSWER_S
        while not (workers := await asyncio.to_thread(self._server.workers)):
            if time.monotonic() > end:
                raise CrashLoopError(f"no worker came back\n{self._server.log_tail()}")
            await asyncio.sleep(0.05)
        with suppress(psutil.NoSuchProcess):
            workers[0].kill()
        self.figures.kills_worker += 1
        if self.figures.kills_worker % _KILLS_BETWEEN_DRAINS == 0:
            await asyncio.to_thread(self._server.stop)
            self.figures.drains += 1
            await self._start()

    async def _verify(self) -> None:
        found: list[str] = []
        self.figures.turns_stored = 0
        async with self._client(_PATIENT) as client:
            for memory in sorted({ledger.memory for ledger in self._ledgers}):
                ledgers = [ledger for ledger in self._ledgers if ledger.memory == memory]
                stored = await _read(client, memory)
                self.figures.turns_stored += len(stored)
                found += [f"{memory}: {problem}" for problem in problems(ledgers, stored)]
                found += [f"{memory}: {p}" for p in await _ask(client, memory, ledgers, stored)]
        found += await self._check()
        self.figures.verifications += 1
        if found:
            shown = "\n".join(found[:20])
            raise CrashLoopError(f"{len(found)} problems, the first of them:\n{shown}")

    async def _check(self) -> list[str]:
        config = load_config({"data": self._server.folder})
        damage: list[str] = []
        async for finding in check_data(config):
            if finding.severity is Severity.DAMAGE:
                damage.append(f"check: {finding}")
            else:
                self.figures.leftovers_seen += 1
        return damage


async def _read(client: AsyncClient, memory: str) -> list[Stored]:
    stored = []
    async for document in client.memory(memory).documents.iterate(page_size=100, full=True):
        if not isinstance(document.source, Conversation):
            raise CrashLoopError(f"{document.name} is no conversation")
        for turn in document.source.turns:
            stored.append(Stored(document.name, document.number, turn.text))
    return stored


async def _ask(
    client: AsyncClient, memory: str, ledgers: list[Ledger], stored: list[Stored]
) -> list[str]:
    """An answer must see every document that is there."""
    revision = max(ledger.revision for ledger in ledgers)
    question = f"What does {ledgers[0].writer} remember?"
    try:
        answer = await client.memory(memory).ask(
            question, at_least_revision=revision, timeout_s=_ANSWER_S
        )
    except MemsvcError as error:
        return [f"no answer: {error}"]
    if answer.done.revision < revision:
        return [f"the answer saw revision {answer.done.revision} of {revision}"]
    if answer.usage is None or answer.usage.routed_documents != len(stored):
        return [f"the answer saw {answer.usage} of {len(stored)} documents"]
    return []


async def crash_loop(options: Options, folder: Path) -> Figures:
    """One run in a fresh folder; the server is ended afterwards. Raises CrashLoopError."""
    with ExitStack() as stack:
        extra: tuple[str, ...] = ("--set", "log_level=warning")
        data = folder / "data"
        if options.target == "server":
            # The worker runs apart and outlives the server, so that cycles are short.
            worker = LiveWorker(data, model=options.engine)
            extra += ("--worker-address", worker.address)
        server = LiveServer(data, model=options.engine, options=extra)
        if options.target == "server":
            worker.start()
            stack.callback(worker.stop)
        stack.callback(server.stop)
        return await CrashLoop(options, server).run()


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing was lost; 1 with the problems on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.crash_loop")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--target", choices=("server", "worker", "both"), default="server")
    parser.add_argument("--engine", default="fake", help="model of the worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    options = Options(**given)
    with tempfile.TemporaryDirectory(prefix="memsvc-crash-") as folder:
        try:
            figures = asyncio.run(crash_loop(options, Path(folder)))
        except CrashLoopError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    if as_json:
        sys.stdout.write(json.dumps(given | vars(figures)) + "\n")
    else:
        for name, value in (given | vars(figures)).items():
            sys.stdout.write(f"{name:22} {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
