"""One run of the crash loop: server, clients, killer and judge. The command is crash_loop.py."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from memsvc.client import AsyncClient, RetryPolicy
from tests.fault.family import Family, Root
from tests.fault.figures import CrashLoopError, Figures
from tests.fault.forker import Forker
from tests.fault.judge import verify
from tests.fault.killer import Killer
from tests.fault.killers import make_killer
from tests.fault.ledger import Ledger
from tests.fault.others import Asker, Deleter, Mover
from tests.fault.scene import Scene, build
from tests.fault.writer import Writer

TARGETS = ("server", "worker", "both", "points", "database", "disk", "host")
#: One try a call: the clients repeat by themselves, and must know what was acknowledged.
_ONE_TRY = RetryPolicy(attempts=1)
_PATIENT = RetryPolicy(attempts=12, initial_s=0.05, ceiling_s=1.0)

#: Told of what was counted whenever all of it was found sound.
Verified = Callable[[Figures], None]


@dataclass
class Options:
    """Times in seconds. database: "" chooses what the target needs."""

    kills: int = 200
    target: str = "server"
    engine: str = "fake"
    database: str = ""
    seed: int = 0
    memories: int = 3
    writers: int = 2
    verify_every: int = 25
    most_acks_between_kills: int = 30
    longest_life_s: float = 3.0


class CrashLoop:
    """One run: server, clients, killer and judge."""

    def __init__(self, options: Options, scene: Scene, verified: Verified) -> None:
        self._options = options
        self._verified = verified
        self._scene = scene
        self._rng = random.Random(options.seed)
        self.figures = Figures()
        self._families: list[Family] = []
        self._acked = asyncio.Event()

    async def run(self) -> Figures:
        """Raises CrashLoopError."""
        started = time.monotonic()
        await asyncio.to_thread(self._scene.server.start)
        self._families = await self._create()
        killer = make_killer(self._options.target, self._scene, self._rng, self.figures, self._live)
        while self.figures.kills < self._options.kills:
            try:
                await self._burst(killer)
            except ExceptionGroup as group:
                log = self._scene.log_tail()
                raise CrashLoopError(f"{log}\n{group.exceptions[0]!r}") from group
            async with self._client(_PATIENT) as client:
                await verify(client, self._families, self._scene.config(), self.figures)
            self.figures.seconds = round(time.monotonic() - started, 1)
            self._verified(self.figures.copy())
        return self.figures

    def _client(self, policy: RetryPolicy) -> AsyncClient:
        server = self._scene.server
        return AsyncClient(server.address, server.api_key, retry=policy)

    async def _create(self) -> list[Family]:
        names = [f"memory-{number}" for number in range(self._options.memories)]
        async with self._client(_PATIENT) as client:
            for name in names:
                await client.memories.create(name)
        writers = range(self._options.writers)
        return [
            Family(Root(name, [Ledger(name, f"{name}-w{writer}") for writer in writers]))
            for name in names
        ]

    async def _burst(self, killer: Killer) -> None:
        """Kills under clients; when it returns all is up and no call is in flight."""
        pause = asyncio.Event()
        kills = min(self.figures.kills + self._options.verify_every, self._options.kills)
        async with self._client(_ONE_TRY) as client, asyncio.TaskGroup() as group:
            for one in self._clients():
                group.create_task(one.run(client, pause))
            while self.figures.kills < kills:
                await killer.kill()
            await killer.rest()
            pause.set()

    def _clients(self) -> Iterator[Writer | Deleter | Asker | Mover | Forker]:
        # A server that lives on takes far more writes than are worth reading back.
        pause_s = 0.0 if self._options.target == "server" else 0.2
        spoiled = self._options.target == "points"
        figures, first = self.figures, self.figures.kills * 1000
        yield Mover(self._random(), figures, spoiled=spoiled, first=first)
        for family in self._families:
            for ledger in family.root.writers:
                yield Writer(ledger, self._random(), figures, self._acked, pause_s)
            yield Deleter(family.root.writers, self._random(), figures)
            yield Asker(family, self._random(), figures, spoiled=spoiled)
            yield Forker(family, self._random(), figures)

    def _random(self) -> random.Random:
        return random.Random(self._rng.random())

    async def _live(self) -> None:
        """Lets the clients do a random amount of work, then a moment more."""
        goal = self.figures.appends_acked + self._rng.randint(
            0, self._options.most_acks_between_kills
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(self._options.longest_life_s):
                while self.figures.appends_acked < goal:
                    await self._acked.wait()
                    self._acked.clear()
        await asyncio.sleep(self._rng.uniform(0.0, 0.01))


async def crash_loop(
    options: Options, folder: Path, verified: Verified = lambda _: None
) -> Figures:
    """One run in a fresh folder; every process is ended afterwards.

    Raises CrashLoopError, CannotTryError.
    """
    database = options.database or ("postgres" if options.target == "database" else "sqlite")
    with ExitStack() as stack:
        scene = await asyncio.to_thread(
            build, stack, folder, options.target, options.engine, database
        )
        return await CrashLoop(options, scene, verified).run()
