"""A server and workers that run apart, as processes that a benchmark may kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.service import MODEL_CACHE

_MEMSVC = (sys.executable, "-m", "memsvc.cli")
_STOP_S = 60


class Process:
    """A process that says one line of JSON once it serves."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def command(self) -> Sequence[str]:
        """How it is started."""
        raise NotImplementedError

    def served(self, line: str) -> None:
        """Told what it said."""

    def start(self) -> None:
        """Blocks until it serves. Raises RuntimeError."""
        self._process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("it did not start; its log says why")
        self.served(line)

    def kill(self) -> None:
        """SIGKILL, and waits."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and waits."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        process.wait(timeout=_STOP_S)
        if process.stdout is not None:
            process.stdout.close()


class WorkerProcess(Process):
    """`memsvc worker`. address: where it listens, always the same. threads: 0: one per core."""

    def __init__(self, data: Path, model: str, address: str, threads: int = 0) -> None:
        super().__init__()
        self._threads = threads
        self._data = data
        self._model = model
        self._address = address

    def command(self) -> Sequence[str]:
        """See Process."""
        here = ["--data-dir", str(self._data), "--threads", str(self._threads)]
        return [*_MEMSVC, "worker", *here, "--model", self._model, "--listen", self._address]


class ServerProcess(Process):
    """`memsvc serve` on a folder that is set up here, with these workers' addresses.

    settings: "name=value".
    """

    def __init__(self, data: Path, workers: str, settings: Sequence[str]) -> None:
        super().__init__()
        self._data = data
        self._options = ["--worker-address", workers]
        self._options += [part for setting in settings for part in ("--set", setting)]
        self.address = ""
        data.mkdir(parents=True)
        MODEL_CACHE.mkdir(parents=True, exist_ok=True)
        (data / "models").symlink_to(MODEL_CACHE.absolute())
        init = [*_MEMSVC, "init", "--data-dir", str(data), "--json"]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        self.api_key = (data / "operator.key").read_text().strip()

    def command(self) -> Sequence[str]:
        """See Process. Started again it listens where it did."""
        listen = self.address or "127.0.0.1:0"
        here = ["--data-dir", str(self._data), "--json", "--listen", listen]
        return [*_MEMSVC, "serve", *here, *self._options]

    def served(self, line: str) -> None:
        """See Process."""
        self.address = json.loads(line)["serving"]
