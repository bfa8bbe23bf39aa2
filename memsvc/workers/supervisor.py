"""One worker process: started, awaited, watched, stopped.

The child is a fresh interpreter (never a fork of this one, whose gRPC threads
would not survive it). Its stdin is a pipe that memsvc never writes to: the
kernel closes it when memsvc ends in whatever way, and the child, started with
--exit-with-parent, exits at that.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from memsvc.config import Config
from storage.paths import DataFolder

log = logging.getLogger(__name__)

#: Linux holds a socket's path in 108 bytes, its end included.
_MAX_SOCKET_PATH = 107

#: For the worker's own end: its callers are gone by then.
_DRAIN_GRACE_S = 5.0


#: Exit status by which a worker says that its model or its settings are at fault.
_EXIT_UNUSABLE = 2


class WorkerStartError(Exception):
    """The worker ended, or stayed silent, before it served. hopeless: it will again."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


@dataclass(frozen=True)
class WorkerCommand:
    """How to start a worker, but for its address."""

    arguments: tuple[str, ...]
    start_timeout_s: float
    stop_grace_s: float = 2 * _DRAIN_GRACE_S

    @classmethod
    def from_config(cls, config: Config) -> WorkerCommand:
        """The supervised worker that the settings describe."""
        arguments = [
            f"--data-dir={config.folder.root.absolute()}",
            f"--model={config.worker_model}",
            f"--adapter={config.worker_adapter}",
            f"--device={config.worker_device}",
            f"--dtype={config.worker_dtype}",
            f"--routing-budget={config.worker_routing_budget or 'auto'}",
            f"--routing-keys={config.worker_routing_keys}",
            f"--content-budget={config.worker_content_budget}",
            f"--lexical-budget={config.worker_lexical_budget}",
            f"--attribute-budget={config.worker_attribute_budget}",
            f"--drain-grace={_DRAIN_GRACE_S:g}",
            f"--log-level={config.log_level}",
        ]
        if config.worker_threads:
            arguments.append(f"--threads={config.worker_threads}")
        return cls(tuple(arguments), config.worker_start_timeout_s)


class SocketPlace:
    """Where the worker's unix socket lies: in the data folder, or where its path is short enough.

    The fallback is a fresh folder that only this user can enter.
    """

    def __init__(self, data: DataFolder) -> None:
        self._made: Path | None = None
        self.path = data.worker_socket.absolute()
        if len(os.fsencode(self.path)) > _MAX_SOCKET_PATH:
            self._made = Path(tempfile.mkdtemp(prefix="memsvc-"))
            self.path = self._made / "worker.sock"

    @property
    def address(self) -> str:
        """As gRPC names it."""
        return f"unix:{self.path}"

    def clear(self) -> None:
        """Removes the socket and the fallback folder."""
        self.path.unlink(missing_ok=True)
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)


class WorkerProcess:
    """A running child. Made by `start`; `stop` must be awaited in the end."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, stop_grace_s: float):
        self._process = process
        self._stop_grace_s = stop_grace_s
        self.address = address
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @classmethod
    async def start(cls, command: WorkerCommand, place: SocketPlace) -> WorkerProcess:
        """Returns when the worker serves. Raises WorkerStartError."""
        place.path.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "model_adapter",
            f"--listen={place.address}",
            "--exit-with-parent",
            *command.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Ctrl-C in a terminal reaches the group: memsvc drains, then stops its worker itself.
            process_group=0,
        )
        worker = cls(process, place.address, command.stop_grace_s)
        try:
            async with asyncio.timeout(command.start_timeout_s):
                await worker._await_ready()
        except TimeoutError as error:
            await worker.stop()
            raise WorkerStartError(f"not ready after {command.start_timeout_s:g} s") from error
        except BaseException:
            await worker.stop()
            raise
        worker._reader = asyncio.create_task(worker._drop_output())
        log.info("worker %d serves on %s", worker.pid, worker.address)
        return worker

    async def wait(self) -> int:
        """Returns the exit status when the child has ended; negative for a signal."""
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when the grace has passed. Returns when the child is gone."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(self._stop_grace_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("worker %d did not end in time; killing it", self.pid)
            self.kill()
        finally:
            # Also when this is cancelled: no child may outlive its owner.
            self.kill()
        await self._process.wait()
        if self._reader is not None:
            await self._reader

    def kill(self) -> None:
        """SIGKILL; no error when the child is already gone."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _await_ready(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict) and message.get("ready") is True:
                return
        status = await self._process.wait()
        raise WorkerStartError(
            f"ended with status {status} before it served; its log says why",
            hopeless=status == _EXIT_UNUSABLE,
        )

    async def _drop_output(self) -> None:
        """Reads on, so that the child never blocks on a full pipe."""
        assert self._process.stdout is not None
        while await self._process.stdout.read(65536):
            pass
