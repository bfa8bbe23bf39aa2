"""The compose file's parts, started by the file's own commands, without containers.

What a container gives is stood in for: the names of services become addresses of this
machine, the volume a folder, the image's entry point this checkout's command.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from memsvc.client import Client, Turn
from tests.deploy.test_compose import ROOT, substituted
from tests.support.live import START_S, environment
from tests.support.postgres import PostgresForTests, postgres
from tests.support.served import free_port

__all__ = ["postgres"]

GIVEN = {"POSTGRES_PASSWORD": "secret", "MEMSVC_MODEL": "fake"}
_MEMSVC = (sys.executable, "-m", "memsvc.cli")


class Composition:
    """The services of the file as processes. home: stands in for the volume."""

    def __init__(self, home: Path, database_url: str) -> None:
        loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        self.services: dict[str, Any] = loaded["services"]
        self._ports = {port: free_port() for port in ("7460", "7461")}
        self._home = home
        self._database_url = database_url

    def address(self, port: str) -> str:
        """Of this machine, where the file has a port."""
        return f"127.0.0.1:{self._ports[port]}"

    def _local(self, word: str) -> str:
        word = substituted(word, GIVEN)
        if word == "postgresql://memsvc:secret@postgres/memsvc":
            return self._database_url
        served = re.fullmatch(r"(?:0\.0\.0\.0|127\.0\.0\.1|[a-z]+):(\d+)", word)
        if served is not None:
            return self.address(served[1])
        if word == "/opt/memsvc/health.py":
            return str(ROOT / "docker" / "health.py")
        return word.replace("/data", str(self._home))

    def start(self, name: str) -> subprocess.Popen[str]:
        """Starts a service by its command, with its settings and no others."""
        service = self.services[name]
        settings = {key: self._local(value) for key, value in service["environment"].items()}
        return subprocess.Popen(
            [*_MEMSVC, *(self._local(word) for word in service["command"])],
            env=environment() | settings,
            cwd=self._home,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, name: str) -> str:
        """Runs a service to its end, which must be a good one; what it printed."""
        process = self.start(name)
        printed, _ = process.communicate(timeout=START_S)
        assert process.returncode == 0
        return printed

    def wait_healthy(self, name: str) -> None:
        """Blocks until the service's health check ends with 0."""
        kind, _python, *check = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [sys.executable, *map(self._local, check)]
        end = time.monotonic() + START_S
        while subprocess.run(command, check=False, env=dict(os.environ)).returncode:
            assert time.monotonic() < end, f"{name} is not healthy"
            time.sleep(0.2)

    def operator_key(self) -> str:
        """The key that `init` has made."""
        return (self._home / "operator.key").read_text().strip()

    def stop(self, process: subprocess.Popen[str], name: str) -> int:
        """As compose does: SIGTERM, and the time that the file gives. The exit status."""
        grace = self.services[name]["stop_grace_period"]
        process.terminate()
        return process.wait(timeout=float(grace.removesuffix("s")))


@pytest.fixture
def composition(postgres: PostgresForTests) -> Iterator[Composition]:
    """With the file's user and database."""
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["postgres"]
    settings = {
        key.removeprefix("POSTGRES_").lower(): substituted(value, GIVEN)
        for key, value in service["environment"].items()
    }
    postgres.execute("CREATE USER {user} PASSWORD '{password}';".format(**settings))
    postgres.execute("CREATE DATABASE {db} OWNER {user};".format(**settings))
    url = re.sub(r"//.*?@", "//{user}:{password}@".format(**settings), postgres.url(settings["db"]))
    with tempfile.TemporaryDirectory(prefix="memsvc-compose-") as home:
        yield Composition(Path(home), url)
    postgres.drop_database(settings["db"])


def test_its_parts_start_answer_and_stop(composition: Composition) -> None:
    composition.run("init")
    composition.run("migrate")
    with ExitStack() as stack:
        running = {name: composition.start(name) for name in ("memsvc", "worker")}
        for process in running.values():
            stack.callback(process.wait)
            stack.callback(process.kill)
        for name in running:
            composition.wait_healthy(name)
        with Client(composition.address("7460"), composition.operator_key()) as client:
            client.memories.create("alice")
            memory = client.memory("alice")
            memory.append([Turn("user", "The telescope stands in Lisbon.")])
            answer = memory.ask("Where does the telescope stand?")
            assert answer.text
            assert [cited.document for cited in answer.citations] == ["memories/alice/documents/1"]
        for name, process in running.items():
            assert composition.stop(process, name) == 0
