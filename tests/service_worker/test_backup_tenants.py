"""Backups of many tenants: their stores are all open at once."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from memsvc.backup import back_up
from memsvc.config import Config, load_config
from memsvc.setup import initialise
from storage.catalog.snapshot import copy_catalog
from storage.lmdb_store import LmdbStore
from tests.support.blocks import make_document, memory_uid

TENANTS = 40


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A folder with many tenants' stores, which the catalog has yet to hear of."""
    config = load_config({"data": tmp_path / "data"})
    initialise(config)
    for number in range(TENANTS):
        _add(config, number)
    return config


def _add(config: Config, number: int) -> None:
    store = LmdbStore(config.folder.tenant(f"{number:032x}"))
    store.put_documents(memory_uid(1), [make_document(1)])
    store.close()


def _run(config: Config, target: Path, limits: tuple[int, int]) -> subprocess.CompletedProcess[str]:
    """`memsvc backup` by a process that may open so many files."""
    return subprocess.run(
        [sys.executable, "-m", "memsvc.cli", "backup", target, "--data-dir", config.data],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        check=False,
    )


def test_more_files_are_opened_than_a_process_may_at_first(config: Config, tmp_path: Path) -> None:
    done = _run(config, tmp_path / "backup", (100, 1000))
    assert "open files" not in done.stderr and "Too many" not in done.stderr
    assert len(list((tmp_path / "backup").glob("tenants/*/data.mdb"))) == TENANTS


def test_too_low_a_limit_is_told_and_leaves_nothing(config: Config, tmp_path: Path) -> None:
    done = _run(config, tmp_path / "backup", (100, 150))
    assert done.returncode not in (0, 13)
    assert "needs 208 open files, and 150 are allowed" in done.stderr
    assert not (tmp_path / "backup").exists()


def test_stores_are_opened_before_writers_are_held_off(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those of tenants that came in between, which are not left out."""
    opened: list[int] = []

    def watched(url: str, target: Path, meanwhile: Callable[[], Any]) -> Any:
        opened.append(_open_stores(config))
        _add(config, TENANTS)
        return copy_catalog(url, target, meanwhile)

    monkeypatch.setattr("memsvc.backup.copy_catalog", watched)
    back_up(config, tmp_path / "backup")
    assert opened == [TENANTS]
    assert len(list((tmp_path / "backup").glob("tenants/*/data.mdb"))) == TENANTS + 1
    assert _open_stores(config) == 0


def _open_stores(config: Config) -> int:
    root = config.folder.tenant("any").parent.resolve()
    paths = [Path(file.path) for file in psutil.Process().open_files()]
    return sum(path.name == "data.mdb" and path.is_relative_to(root) for path in paths)
