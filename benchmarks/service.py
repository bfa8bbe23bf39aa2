"""A whole memsvc service for benchmarks: data folder, server and worker as real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memsvc.client import Client

#: Fetched models stay here between runs; everything else is temporary.
MODEL_CACHE = Path(".data/models")


@dataclass(frozen=True)
class Service:
    """A running server. process: its id."""

    address: str
    api_key: str
    data: Path
    process: int

    def client(self) -> Client:
        """A new connection with the operator's key."""
        return Client(self.address, self.api_key)


@contextmanager
def running(data: Path, model: str, *settings: str) -> Iterator[Service]:
    """Sets up `data` when it is new, serves it until the block ends, drains.

    settings: "name=value" of docs/configuration.md.
    """
    data.mkdir(parents=True, exist_ok=True)
    MODEL_CACHE.mkdir(parents=True, exist_ok=True)
    if not (data / "models").exists():
        (data / "models").symlink_to(MODEL_CACHE.absolute())
    memsvc, here = [sys.executable, "-m", "memsvc.cli"], ["--data-dir", str(data), "--json"]
    subprocess.run([*memsvc, "init", *here], check=True, stdout=subprocess.DEVNULL)
    options = [part for setting in settings for part in ("--set", setting)]
    server = subprocess.Popen(
        [*memsvc, "serve", *here, "--listen", "127.0.0.1:0", "--model", model, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start; its log says why")
        address, key = json.loads(line)["serving"], (data / "operator.key").read_text().strip()
        yield Service(address, key, data, server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
