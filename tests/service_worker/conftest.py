from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.answers import Asking, asking
from tests.support.served import Folder, make_folder

Serve = Callable[..., AbstractAsyncContextManager[Asking]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Initialised once; each test works on a copy."""
    return make_folder(tmp_path_factory.mktemp("template") / "data")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Asking]:
    """One server and worker for the tests of a module, which run in the module's loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        async with asking(folder, tmp_path_factory.mktemp("shared") / "data") as running:
            yield running


@pytest.fixture
def start(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """`async with start(worker_model="fake:...") as asking`: a server and its worker process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def begin(**settings: object) -> AbstractAsyncContextManager[Asking]:
        return asking(folder, tmp_path / "data", **settings)

    return begin


@pytest.fixture
async def served(start: Serve) -> AsyncIterator[Asking]:
    """A server with a worker that takes no time."""
    async with start() as running:
        yield running
