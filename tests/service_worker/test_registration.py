"""Workers that come by themselves: registered, listed, lost, back after a restart."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from memsvc.api import registry
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.workers import registered
from memsvc.workers.registered import Registered
from memsvc.workers.supervisor import SocketPlace, WorkerCommand, WorkerProcess
from model_adapter import main
from model_adapter.v1 import registry_pb2 as pb
from model_adapter.v1.registry_pb2_grpc import WorkerRegistryServiceStub
from storage.paths import DataFolder
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually
from tests.support.served import Caller, Folder, refused


@asynccontextmanager
async def coming(
    served: Asking, folder: Path, key: str, model: str = "fake"
) -> AsyncIterator[WorkerProcess]:
    """A worker that is told where memsvc is, and not the other way round."""
    await asyncio.to_thread(folder.mkdir)
    key_file = folder / "key"
    await asyncio.to_thread(key_file.write_text, f"{key}\n")
    arguments = (
        f"--data-dir={served.app.config.folder.root}",
        f"--model={model}",
        "--threads=1",
        f"--register={served.server.address}",
        f"--register-key={key_file}",
    )
    place = SocketPlace(DataFolder(folder))
    worker = await WorkerProcess.start(WorkerCommand(arguments, 60.0), place)
    try:
        yield worker
    finally:
        await worker.stop()
        place.clear()


async def listed(served: Asking) -> dict[str, admin.Worker]:
    request = admin.ListWorkersRequest()
    found = await served.as_operator(served.admin.ListWorkers, request)
    return {worker.address: worker for worker in found.workers}


async def _serving(served: Asking, count: int) -> bool:
    states = [worker.state for worker in (await listed(served)).values()]
    return states.count(admin.Worker.SERVING) == count


def register(served: Asking, address: str, **fields: Any) -> Any:
    stub: Any = WorkerRegistryServiceStub(served.channel)
    return served.as_operator(stub.Register, pb.RegisterRequest(address=address, **fields))


async def test_a_worker_comes_serves_and_leaves(
    folder: Folder, start: Serve, tmp_path: Path
) -> None:
    async with start(worker_address="none") as served:
        assert await listed(served) == {}
        memory = await served.create()
        assert memory.default_model == ""
        await served.append(memory.name, "Olga repaired the boiler")
        async with coming(served, tmp_path / "a", folder.credential) as worker:
            await eventually(lambda: _serving(served, 1))
            assert (await served.ask(memory.name, "boiler")).cited == [1]
            (found,) = (await listed(served)).values()
            assert (found.address, found.model) == (worker.address, "models/fake")
            assert (found.device, found.compute_dtype) == ("cpu", "fp32")
            assert len(found.identity) == 64
            os.kill(worker.pid, signal.SIGTERM)

            async def gone() -> bool:
                return served.app.workers.find("fake") is None

            await eventually(gone)
        again = await served.get(memory.name)
        assert again.default_model == "models/fake", "the first that comes is the default"


async def test_one_of_two_dies(folder: Folder, start: Serve, tmp_path: Path) -> None:
    async with (
        start(worker_address="none") as served,
        coming(served, tmp_path / "a", folder.credential) as one,
        coming(served, tmp_path / "b", folder.credential) as two,
    ):
        await eventually(lambda: _serving(served, 2))
        memories = [(await served.create()).name for _ in range(4)]
        for memory in memories:
            await served.append(memory, "Olga repaired the boiler")
            assert (await served.ask(memory, "boiler")).cited == [1]
        os.kill(one.pid, signal.SIGKILL)
        for memory in memories:
            assert (await served.ask(memory, "boiler")).cited == [1]
        await eventually(lambda: _serving(served, 1))
        assert (await listed(served))[two.address].state == admin.Worker.SERVING


async def test_a_server_that_was_restarted_is_found_again(
    folder: Folder, start: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "HEARTBEAT_S", 0.5)
    socket = f"unix:{tmp_path}/memsvc.sock"
    async with start(worker_address="none", listen=socket) as served:
        worker = coming(served, tmp_path / "a", folder.credential)
        await worker.__aenter__()
        await eventually(lambda: _serving(served, 1))
    try:
        async with start(worker_address="none", listen=socket) as served:
            await eventually(lambda: _serving(served, 1))
    finally:
        await worker.__aexit__(None, None, None)


async def test_what_is_refused(folder: Folder, start: Serve) -> None:
    async with start(worker_address="none") as served:
        stub: Any = WorkerRegistryServiceStub(served.channel)
        key = admin.CreateApiKeyRequest(
            parent="tenants/default", api_key=admin.ApiKey(scope=admin.ADMIN)
        )
        made = await served.as_operator(served.admin.CreateApiKey, key)
        lesser = Caller(made.secret)
        found = await refused(lesser(stub.Register, pb.RegisterRequest(address="unix:/x")))
        assert found.reason == "SCOPE_INSUFFICIENT", "a tenant's admin may not add workers"
        found = await refused(lesser(served.admin.ListWorkers, admin.ListWorkersRequest()))
        assert found.reason == "SCOPE_INSUFFICIENT"
        found = await refused(stub.Register(pb.RegisterRequest(address="unix:/x")))
        assert found.reason == "CREDENTIAL_INVALID"
        assert (await refused(register(served, ""))).reason == "FIELD_REQUIRED"
        for address in (
            "nonsense",
            "unix:",
            "unix:relative",
            "host:",
            "host:port",
            "a:1,b:2",
            "a b:1",
        ):
            found = await refused(register(served, address))
            assert (found.reason, found.field) == ("FIELD_INVALID", "address"), address
        assert (await refused(register(served, "x" * 300))).reason == "TEXT_TOO_LONG"
        assert (await register(served, "unix:/unknown", leaving=True)).heartbeat_s > 0
        assert await listed(served) == {}


async def test_a_lease_ends_and_registrations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    async def announce(*_: Any) -> None:
        raise AssertionError("nothing answers there")

    leases = Registered(announce, lambda _: None, lambda: now)
    monkeypatch.setattr(registered, "MAX_REGISTERED", 2)
    try:
        await asyncio.gather(*(leases.renew("unix:/nowhere/a") for _ in range(3)))
        assert [e.address for e in leases.endpoints] == ["unix:/nowhere/a"]
        now += 20
        await leases.renew("unix:/nowhere/b")
        now += 20
        await leases.expire()
        assert [e.address for e in leases.endpoints] == ["unix:/nowhere/b"]
        await leases.renew("unix:/nowhere/c")
        with pytest.raises(Exception, match="2 are allowed"):
            await leases.renew("unix:/nowhere/d")
        leases.leave("unix:/nowhere/c")
        await leases.expire()
        assert [e.address for e in leases.endpoints] == ["unix:/nowhere/b"]
    finally:
        await leases.close()
    assert leases.endpoints == []


async def test_a_heartbeat_counts_while_another_worker_is_dropped() -> None:
    now = 100.0

    async def announce(*_: Any) -> None:
        raise AssertionError("nothing answers there")

    leases = Registered(announce, lambda _: None, lambda: now)
    try:
        for name in ("a", "b"):
            await leases.renew(f"unix:/nowhere/{name}")
        now += 40
        expiring = asyncio.create_task(leases.expire())
        await asyncio.sleep(0)
        assert len(leases.endpoints) == 1 and not expiring.done()
        await leases.renew("unix:/nowhere/b")
        await expiring
        assert [e.address for e in leases.endpoints] == ["unix:/nowhere/b"]
    finally:
        await leases.close()


async def test_a_worker_that_is_not_wanted_serves_on(start: Serve, tmp_path: Path) -> None:
    async with (
        start(worker_address="none") as served,
        coming(served, tmp_path / "a", "msk_" + "0" * 16 + "_" + "0" * 64) as worker,
    ):
        await asyncio.sleep(0.5)
        assert await listed(served) == {}
        # Whoever knows its address may use it.
        await register(served, worker.address)
        await eventually(lambda: _serving(served, 1))


@pytest.mark.parametrize(
    "more", [("--register=host:1",), ("--register=host:1", "--register-key=/nonexistent/key")]
)
def test_half_a_registration_is_a_mistake(tmp_path: Path, more: tuple[str, ...]) -> None:
    line = ["--listen=unix:/tmp/x.sock", f"--data-dir={tmp_path}", "--model=fake", *more]
    assert main.main(line) == main.EXIT_UNUSABLE
