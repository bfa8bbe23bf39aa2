"""What fails under the server: its database, its disk, its power."""

from __future__ import annotations

import asyncio
import random
import shutil

from tests.fault.figures import CannotTryError, Figures, count
from tests.fault.killer import Live, SceneKiller
from tests.fault.scene import Scene
from tests.support.live import LiveError

#: System calls by which LMDB and SQLite make things durable, and what they can fail with.
_DISK_ERRORS = (
    ("fdatasync", "EIO"),
    ("fsync", "EIO"),
    ("pwrite64", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("pwritev", "ENOSPC"),
    ("writev", "EIO"),
)


class DatabaseKiller(SceneKiller):
    """SIGKILL to every process of PostgreSQL, mid-transaction; server and clients go on."""

    async def kill(self) -> None:
        """See Killer."""
        postgres = self._scene.postgres
        assert postgres is not None
        await self._live()
        await asyncio.to_thread(postgres.kill)
        self._figures.kills_database += 1
        await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        await asyncio.to_thread(postgres.start)


class DiskKiller(SceneKiller):
    """Servers whose disk fails now and then, by an error put in for a system call, then killed."""

    def __init__(self, scene: Scene, rng: random.Random, figures: Figures, live: Live) -> None:
        super().__init__(scene, rng, figures, live)
        if shutil.which("strace") is None:
            raise CannotTryError("disk errors need strace")

    async def kill(self) -> None:
        """See Killer."""
        server = self._scene.server
        call, error = self._rng.choice(_DISK_ERRORS)
        first, step = self._rng.randint(1, 40), self._rng.randint(2, 30)
        inject = f"inject={call}:error={error}:when={first}+{step}"
        trace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
        await asyncio.to_thread(server.kill)
        self._figures.dark = True
        server.spawn(under=trace)
        try:
            await asyncio.to_thread(server.wait_serving)
        except LiveError:
            self._figures.kills_while_starting += 1
        else:
            await self._live()
        await asyncio.to_thread(server.kill)
        count(self._figures.disk_errors, f"{call} {error}")
        await asyncio.to_thread(server.start)
        self._figures.dark = False
        self._figures.kills_server += 1


class PowerKiller(SceneKiller):
    """Cuts the power of the disk under everything; the processes end after it, not before."""

    async def kill(self) -> None:
        """See Killer."""
        await self._live()
        self._figures.dark = True
        await asyncio.to_thread(self._cut)
        self._figures.dark = False
        self._figures.power_cuts += 1

    def _cut(self) -> None:
        scene = self._scene
        assert scene.disk is not None and scene.worker is not None
        scene.disk.power_off()
        scene.server.kill()
        scene.worker.kill()
        if scene.postgres is not None:
            scene.postgres.kill()
        scene.disk.take_out()
        scene.disk.power_on()
        if scene.postgres is not None:
            scene.postgres.start()
        scene.worker.spawn()
        scene.server.spawn()
        scene.worker.wait_serving()
        scene.server.wait_serving()
