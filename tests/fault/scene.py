"""The processes of one crash loop: server, worker, database, and the disk they are on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from memsvc.config import Config, load_config
from tests.fault.power import PowerDisk
from tests.support.live import LiveServer, LiveWorker
from tests.support.postgres import PostgresForTests

#: Targets whose worker is the server's own child. With the others it runs apart and
#: outlives the server, so that rounds are short.
SUPERVISED = ("worker", "both")


@dataclass
class Scene:
    """worker: None when the server supervises it. postgres, disk: where the target needs one."""

    server: LiveServer
    worker: LiveWorker | None
    postgres: PostgresForTests | None
    disk: PowerDisk | None
    database_url: str

    def log_tail(self) -> str:
        """The end of what the processes logged."""
        return self.server.log_tail() + (self.worker.log_tail() if self.worker else "")

    def config(self) -> Config:
        """The server's settings, for reading its data from beside."""
        return load_config({"data": self.server.folder, "database_url": self.database_url})


def build(stack: ExitStack, folder: Path, target: str, engine: str, database: str) -> Scene:
    """Makes the folder and starts everything but the server. Raises CannotTryError."""
    disk = None
    home = folder
    if target == "host":
        disk = PowerDisk(folder)
        stack.callback(disk.close)
        home = disk.mount
    postgres, url = None, ""
    if database == "postgres":
        folder.chmod(0o755)
        postgres = PostgresForTests(home / "postgres", durable=True)
        stack.callback(postgres.stop)
        url = postgres.url(postgres.make_database())
    data = home / "data"
    extra: tuple[str, ...] = ("--set", "log_level=warning")
    worker = None
    if target not in SUPERVISED:
        worker = LiveWorker(data, model=engine, logs=folder)
        extra += ("--worker-address", worker.address)
    server = LiveServer(data, model=engine, options=extra, logs=folder, database_url=url)
    if worker is not None:
        worker.start()
        stack.callback(worker.stop)
    stack.callback(server.stop)
    return Scene(server, worker, postgres, disk, url)
