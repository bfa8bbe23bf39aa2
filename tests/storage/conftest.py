"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.archive import open_archive


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        path = tmp_path / "a.msamem"
        path.write_bytes(data)
        open_archive(path).close()

    return run
