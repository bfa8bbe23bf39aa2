from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.support.served import Folder, Serve, Served, make_folder, serve


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Initialised once; each test works on a copy."""
    return make_folder(tmp_path_factory.mktemp("template") / "data")


@pytest.fixture
def start(folder: Folder, tmp_path: Path) -> Serve:
    """`async with start(setting=value) as served` on this test's own folder."""

    def begin(**settings: object) -> AbstractAsyncContextManager[Served]:
        return serve(folder.copy(tmp_path / "data", **settings), folder.credential)

    return begin


@pytest.fixture
async def served(start: Serve) -> AsyncIterator[Served]:
    """A server with default settings."""
    async with start() as running:
        yield running
