from __future__ import annotations

import asyncio
import signal
import sqlite3
import stat
import sys
from pathlib import Path

import pytest

from memsvc.auth import ServerKeyError
from memsvc.clock import SteadyClock
from memsvc.config import load_config
from memsvc.server import ServerStartError, initialise, open_server
from memsvc.setup import DataFolderError
from memsvc.v1 import memory_service_pb2 as pb
from storage.store import StorageError
from tests.service.test_writes import MODEL, failing_once
from tests.support.served import NO_WORKER, Folder, Serve, free_port, refused, serve


def test_initialising_twice_changes_nothing(tmp_path: Path) -> None:
    config = load_config({"data": tmp_path / "data"})
    first = initialise(config)
    assert first.tenant_id == "default"
    assert first.credential is not None
    key = config.folder.server_key.read_bytes()
    assert initialise(config).credential is None
    assert config.folder.server_key.read_bytes() == key
    assert stat.S_IMODE(config.data.stat().st_mode) == 0o700


def test_a_lost_server_key_brings_a_new_operator_key(tmp_path: Path) -> None:
    config = load_config({"data": tmp_path / "data"})
    first = initialise(config)
    config.folder.server_key.unlink()
    second = initialise(config)
    assert second.credential not in (None, first.credential)


async def test_a_second_server_on_a_folder_fails_clearly(start: Serve) -> None:
    async with start() as served:
        config = served.server.application.config
        with pytest.raises(DataFolderError, match="another memsvc process"):
            async with open_server(config):
                pass
        await served.create("unharmed")


async def test_a_taken_port_fails_clearly(folder: Folder, tmp_path: Path) -> None:
    port = free_port()
    one = folder.copy(tmp_path / "one", listen=f"127.0.0.1:{port}")
    two = folder.copy(tmp_path / "two", listen=f"127.0.0.1:{port}")
    async with serve(one, folder.credential):
        with pytest.raises(ServerStartError, match=str(port)):
            async with open_server(two):
                pass
    # What the failed start had opened is closed again.
    async with serve(two, folder.credential) as served:
        await served.create("works")


async def test_what_is_missing_is_said(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(DataFolderError, match="memsvc init"):
        async with open_server(load_config({"data": tmp_path / "nowhere"})):
            pass
    config = folder.copy(tmp_path / "keyless")
    config.folder.server_key.unlink()
    with pytest.raises(ServerKeyError, match="memsvc init"):
        async with open_server(config):
            pass
    config = folder.copy(tmp_path / "old")
    with sqlite3.connect(config.folder.catalog) as database:
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    with pytest.raises(ServerStartError, match="memsvc migrate"):
        async with open_server(config):
            pass


async def test_a_unix_socket(start: Serve, tmp_path: Path) -> None:
    async with start(listen=f"unix:{tmp_path}/m.sock") as served:
        assert served.server.address.endswith("/m.sock")
        await served.create("local")


async def test_request_ids_are_forgotten_in_time(
    start: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as served:
        memory = await served.create("oblivious")
        await served.append(memory.name, "x", request_id="r-1")
        refusal = await refused(served.append(memory.name, "y", request_id="r-1"))
        assert refusal.reason == "REQUEST_ID_REUSED"
    in_a_day_s = SteadyClock().now_s() + 86_401
    monkeypatch.setattr("memsvc.housekeeping.SteadyClock.now_s", lambda _: in_a_day_s)
    monkeypatch.setattr("memsvc.housekeeping._EVERY_S", 0.05)
    async with start() as served:
        await asyncio.sleep(0.3)
        assert (await served.append(memory.name, "y", request_id="r-1")).revision == 2


async def test_a_deletion_that_failed_half_way_is_finished(
    start: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memsvc.housekeeping._EVERY_S", 0.2)
    async with start() as served:
        memory = await served.create("stubborn")
        await served.append(memory.name, "x")
        app = served.server.application
        with monkeypatch.context() as patch:
            broken = failing_once(app.stores.run, StorageError("no"), after=False)
            patch.setattr(app.stores, "run", broken)
            delete = pb.DeleteMemoryRequest(name=memory.name)
            refusal = await refused(served.as_operator(served.memories.DeleteMemory, delete))
            assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "DELETION_UNFINISHED")
        # Gone for callers at once, and for the disk a little later.
        refusal = await refused(served.as_operator(served.memories.DeleteMemory, delete))
        assert refusal.reason == "MEMORY_NOT_FOUND"
        tenant = (await app.catalog.get_tenant("default")).uid
        async with asyncio.timeout(5):
            while await app.stores.read(tenant, lambda store: store.memories()):  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.05)


async def test_models_that_no_worker_serves_are_listed_as_unavailable(start: Serve) -> None:
    from memsvc.v1 import resources_pb2 as resources

    async with start() as served:
        await served.server.application.catalog.upsert_model(MODEL)
        page = await served.as_operator(served.memories.ListModels, pb.ListModelsRequest())
        (model,) = page.models
        assert model.name == "models/slow-model"
        assert (model.state, model.default_model) == (resources.Model.UNAVAILABLE, True)
        memory = await served.create("known")
        assert [e.model for e in memory.encodings] == [model.name]
        got = await served.as_operator(
            served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name)
        )
        assert got == memory


SERVE = """
import asyncio, sys
from memsvc.config import load_config
from memsvc.server import run
config = load_config({"data": sys.argv[1], "listen": "127.0.0.1:0", "worker_address": sys.argv[2]})
asyncio.run(run(config, lambda address: print(address, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_cleanly(
    folder: Folder, tmp_path: Path, number: signal.Signals
) -> None:
    config = folder.copy(tmp_path / "data")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, str(config.data), NO_WORKER, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert (await process.stdout.readline()).startswith(b"127.0.0.1:")
        process.send_signal(number)
        assert await process.wait() == 0
    # Nothing holds the folder any more.
    async with serve(config, folder.credential) as served:
        await served.create("after")
