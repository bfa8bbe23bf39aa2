"""Ways to kill: each lets the clients work for a while, kills, and brings everything back."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil

from storage.failpoints import Failpoint
from tests.fault.figures import CrashLoopError, Figures, count
from tests.fault.killer import Killer, Live, SceneKiller
from tests.fault.outages import DatabaseKiller, DiskKiller, PowerKiller
from tests.fault.scene import Scene
from tests.fault.spoil import MENDING, spoil
from tests.support.live import LiveError, run_cli

_ANSWER_S = 90.0
_KILLED_STARTING_SHARE = 0.15
#: A server starts a worker that dies often ever more slowly, up to 30 s; one that is stopped
#: and started again begins anew.
_KILLS_BETWEEN_DRAINS = 5
#: How long a server armed with a failpoint may live before it is killed in the old way.
_ARMED_S = 8.0
#: Points of single steps, come by once in a while; the others are come by all the time.
_FREQUENT = ("store", "catalog", "append", "encode")
_MIGRATIONS = (Failpoint.MIGRATE_UNCOMMITTED, Failpoint.MIGRATE_COMMITTED)
#: Not the server's: a backup that dies leaves nothing that a server looks at.
_BACKUPS = tuple(point for point in Failpoint if point.startswith(("backup", "restore")))


class ServerKiller(SceneKiller):
    """SIGKILL to the server at a random moment, and now and then while it starts again."""

    def __init__(self, scene: Scene, rng: random.Random, figures: Figures, live: Live) -> None:
        super().__init__(scene, rng, figures, live)
        self._started_s = 1.0

    async def kill(self) -> None:
        """See Killer."""
        server = self._scene.server
        await self._live()
        await asyncio.to_thread(server.kill)
        self._figures.kills_server += 1
        # Starting is work too: reconciling must survive its own death.
        while self._rng.random() < _KILLED_STARTING_SHARE:
            server.spawn()
            await asyncio.sleep(self._rng.uniform(0.3, 1.0) * self._started_s)
            await asyncio.to_thread(server.kill)
            self._figures.kills_while_starting += 1
        begun = time.monotonic()
        await asyncio.to_thread(server.start)
        self._started_s = time.monotonic() - begun


class WorkerKiller(SceneKiller):
    """SIGKILL to the supervised worker, one that serves or now and then one that starts."""

    async def kill(self) -> None:
        """See Killer. The server starts another worker by itself."""
        await self._live()
        if self._rng.random() > _KILLED_STARTING_SHARE:
            await asyncio.to_thread(self._scene.server.wait_model)
            await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        else:
            self._figures.kills_while_starting += 1
        end = time.monotonic() + _ANSWER_S
        while not (workers := await asyncio.to_thread(self._scene.server.workers)):
            if time.monotonic() > end:
                raise CrashLoopError(f"no worker came back\n{self._scene.server.log_tail()}")
            await asyncio.sleep(0.05)
        with suppress(psutil.NoSuchProcess):
            workers[0].kill()
        self._figures.kills_worker += 1
        if self._figures.kills_worker % _KILLS_BETWEEN_DRAINS == 0:
            await asyncio.to_thread(self._scene.server.stop)
            self._figures.drains += 1
            await asyncio.to_thread(self._scene.server.start)


class PointKiller(SceneKiller):
    """Servers that die at a failpoint, one after another through all of them."""

    def __init__(self, scene: Scene, rng: random.Random, figures: Figures, live: Live) -> None:
        super().__init__(scene, rng, figures, live)
        self._points = self._shuffled()
        self._armed: Failpoint | None = None

    def _shuffled(self) -> Iterator[Failpoint]:
        while True:
            points = [point for point in Failpoint if point not in _BACKUPS]
            yield from self._rng.sample(points, len(points))

    async def kill(self) -> None:
        """See Killer. The server that runs is killed where it was told, or in the end anyway."""
        await self._die()
        await self._arm()

    async def rest(self) -> None:
        """See Killer: the armed server makes room for one that is not."""
        if self._armed is not None:
            await self._die()
            self._armed = None
            await asyncio.to_thread(self._mend)
            await asyncio.to_thread(self._scene.server.start)

    async def _die(self) -> None:
        server = self._scene.server
        if self._armed is None:
            await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        else:
            died = await asyncio.to_thread(server.ends_within, _ARMED_S)
            figures = self._figures
            count(figures.kills_at if died else figures.points_not_reached, self._armed.value)
        await asyncio.to_thread(server.kill)
        self._figures.kills_server += 1

    async def _arm(self) -> None:
        """Starts a server armed with the next point; one that dies starting counts as well."""
        server = self._scene.server
        while True:
            point = self._armed = next(self._points)
            if point in _MIGRATIONS:
                await asyncio.to_thread(self._migrate, point)
                continue
            if point in MENDING:
                await asyncio.to_thread(spoil, self._scene.server.folder, point, self._rng)
            nth = self._rng.randint(1, 20 if point.value.startswith(_FREQUENT) else 2)
            server.spawn("--set", f"failpoint={point.value}:{nth}")
            try:
                await asyncio.to_thread(server.wait_serving)
            except LiveError:
                if await asyncio.to_thread(server.ended) != -9:
                    raise
                count(self._figures.kills_at, point.value)
                self._figures.kills_server += 1
                self._figures.kills_while_starting += 1
            else:
                return

    def _mend(self) -> None:
        """What was spoiled and no question came by is still there."""
        done = self._run("reconcile")
        if done.returncode:
            raise CrashLoopError(f"not mended: {done.stderr.decode()}{done.stdout.decode()}")

    def _run(self, command: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
        if self._scene.database_url:
            environ["MEMSVC_DATABASE_URL"] = self._scene.database_url
        return run_cli(command, "--data-dir", self._scene.server.folder, extra=environ)

    def _migrate(self, point: Failpoint) -> None:
        done = self._run("migrate", MEMSVC_FAILPOINT=point.value)
        if done.returncode != -9:
            raise CrashLoopError(f"migrate outlived {point}: {done.stderr.decode()}")
        count(self._figures.kills_at, point.value)
        self._figures.kills_server += 1


class Alternating(Killer):
    """Several killers in random order."""

    def __init__(self, killers: list[Killer], rng: random.Random) -> None:
        self._killers = killers
        self._rng = rng

    async def kill(self) -> None:
        """See Killer."""
        await self._rng.choice(self._killers).kill()

    async def rest(self) -> None:
        """See Killer."""
        for killer in self._killers:
            await killer.rest()


def make_killer(
    target: str,
    scene: Scene,
    rng: random.Random,
    figures: Figures,
    live: Live,
) -> Killer:
    """The killer of a target's name."""
    kinds: dict[str, list[Callable[[Scene, random.Random, Figures, Live], Killer]]] = {
        "server": [ServerKiller],
        "worker": [WorkerKiller],
        "both": [ServerKiller, WorkerKiller],
        "points": [PointKiller],
        "database": [DatabaseKiller],
        "disk": [DiskKiller],
        "host": [PowerKiller],
    }
    return Alternating([kind(scene, rng, figures, live) for kind in kinds[target]], rng)
