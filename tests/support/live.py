"""A real server in a process of its own, as `memsvc serve` starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from memsvc.client import Client

START_S = 90.0
_MEMSVC = (sys.executable, "-m", "memsvc.cli")


class LiveError(AssertionError):
    """A process did not do what it should."""


def environment() -> dict[str, str]:
    """This process's, without settings of memsvc, and with one thread for torch."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMSVC_")}
    return kept | {"OMP_NUM_THREADS": "1"}


def run_cli(
    *arguments: str | Path, stdin: str | bytes = b"", extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs `memsvc ...` to its end."""
    return subprocess.run(
        [*_MEMSVC, *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env=environment() | (extra or {}),
        timeout=120,
        check=False,
    )


class LiveServer:
    """A data folder and, while started, the server on it.

    logs: folder of the log, beside the data folder unless told. database_url: as the setting.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str = "fake",
        options: Sequence[str] = (),
        logs: Path | None = None,
        database_url: str = "",
    ) -> None:
        self.folder = folder
        self.log = (logs or folder.parent) / f"{folder.name}.log"
        self.address = ""
        self._options = ("--model", model, *options)
        self._environment = environment()
        if database_url:
            self._environment["MEMSVC_DATABASE_URL"] = database_url
        self._process: subprocess.Popen[str] | None = None
        self._under = False
        if not folder.exists():
            done = run_cli("init", "--data-dir", folder, "--json", extra=self._environment)
            if done.returncode != 0:
                raise LiveError(done.stderr.decode())
        self.api_key = (folder / "operator.key").read_text().strip()

    @property
    def process(self) -> psutil.Process:
        """The server's process. Raises LiveError when there is none."""
        if self._process is None:
            raise LiveError("not started")
        return psutil.Process(self._process.pid)

    def ends_within(self, timeout_s: float) -> bool:
        """Waits that long for it to end by itself. Raises LiveError when not started."""
        if self._process is None:
            raise LiveError("not started")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
            return True
        return False

    def spawn(self, *more: str, under: Sequence[str] = ()) -> None:
        """Starts the server, with more options, and does not wait until it serves.

        under: a command that runs it as its child, a tracer for one.
        """
        self._under = bool(under)
        listen = self.address or "127.0.0.1:0"
        command = [*_MEMSVC, "serve", "--data-dir", str(self.folder), "--listen", listen, "--json"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*under, *command, *self._options, *more],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )

    def wait_serving(self) -> None:
        """Blocks until it serves. Raises LiveError with the log's end when it does not."""
        if self._process is None or self._process.stdout is None:
            raise LiveError("not started")
        line = self._process.stdout.readline()
        if not line:
            raise LiveError(f"the server did not start:\n{self.log_tail()}")
        self.address = json.loads(line)["serving"]

    def start(self) -> None:
        """Starts the server and waits until it serves."""
        self.spawn()
        self.wait_serving()

    def kill(self) -> None:
        """SIGKILL to the server alone; a supervised worker sees its parent end."""
        if self._process is not None:
            if self._under:
                # A tracer that is killed lets its child go on.
                for child in psutil.Process(self._process.pid).children():
                    child.kill()
            self._process.kill()
            self._reap()

    def stop(self) -> int:
        """SIGTERM, then waits; the exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        return self._reap()

    def ended(self) -> int:
        """Waits until it ends by itself; the exit status."""
        return self._reap()

    def _reap(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        status = process.wait(timeout=START_S)
        if process.stdout is not None:
            process.stdout.close()
        return status

    def workers(self) -> list[psutil.Process]:
        """The model workers that the server supervises and that run now."""
        found = []
        for child in self.process.children(recursive=True):
            # One that has just ended is still listed, without a command line.
            with suppress(psutil.NoSuchProcess):
                if "model_adapter" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def client(self) -> Client:
        """A client with the operator's key."""
        return Client(self.address, self.api_key)

    def wait_model(self) -> None:
        """Blocks until a worker serves a model."""
        end = time.monotonic() + START_S
        with self.client() as client:
            while not any(m.state == "serving" for m in client.models.list().items):
                if time.monotonic() > end:
                    raise LiveError(f"no worker came up:\n{self.log_tail()}")
                time.sleep(0.05)

    def log_tail(self) -> str:
        """The end of what the server logged."""
        return self.log.read_text(errors="replace")[-4000:]


@contextmanager
def live_server(
    folder: Path, *, model: str = "fake", options: Sequence[str] = ()
) -> Iterator[LiveServer]:
    """A server with the fake engine, serving; stopped at the end."""
    server = LiveServer(folder, model=model, options=options)
    server.start()
    try:
        server.wait_model()
        yield server
    finally:
        server.stop()


class LiveWorker:
    """A model worker that runs apart from the server, on a Unix socket beside its folder."""

    def __init__(self, folder: Path, *, model: str = "fake", logs: Path | None = None) -> None:
        self.folder = folder
        logs = logs or folder.parent
        self._log = logs / "worker-apart.log"
        self.address = f"unix:{logs / 'worker-apart.sock'}"
        self._model = model
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts it and waits until it serves."""
        self.spawn()
        self.wait_serving()

    def spawn(self) -> None:
        """Starts it and does not wait."""
        command = [*_MEMSVC, "worker", "--data-dir", str(self.folder), "--model", self._model]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--listen", self.address],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
            )

    def wait_serving(self) -> None:
        """Blocks until it serves. Raises LiveError."""
        process = self._process
        if process is None or process.stdout is None or not process.stdout.readline():
            raise LiveError("the worker did not start")

    def log_tail(self) -> str:
        """The end of what it logged."""
        return self._log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """SIGKILL, then waits."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, then waits; the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        status = self._process.wait(timeout=START_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
        return status
