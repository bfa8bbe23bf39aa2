"""TLS and mutual TLS: clients to the server, and the server to its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc import aio

from memsvc.client import TLS, AsyncClient, UnavailableError
from memsvc.client.retry import NO_RETRIES
from memsvc.config import load_config
from memsvc.server import ServerStartError, open_server
from memsvc.settings import ConfigError
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import memory_service_pb2_grpc
from tests.support.answers import Asking
from tests.support.certificates import Authority, Pair
from tests.support.live_worker import WorkerProcess
from tests.support.served import Caller, Folder, serve


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def server_pair(authority: Authority) -> Pair:
    return authority.pair("server")


def shown(pair: Pair) -> dict[str, object]:
    return {"tls_certificate": str(pair.certificate), "tls_private_key": str(pair.key)}


def trusting(authority: Authority, pair: Pair | None = None) -> TLS:
    if pair is None:
        return TLS(authority.roots.read_bytes())
    return TLS(authority.roots.read_bytes(), pair.certificate.read_bytes(), pair.key.read_bytes())


async def lists(address: str, api_key: str, tls: TLS | None) -> int:
    client = AsyncClient(address, api_key, tls=tls, retry=NO_RETRIES)
    async with client:
        return len((await client.memories.list(timeout_s=5)).items)


async def test_serving_with_tls(
    folder: Folder, tmp_path: Path, authority: Authority, stranger: Authority, server_pair: Pair
) -> None:
    config = folder.copy(tmp_path / "data", **shown(server_pair))
    async with open_server(config) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        assert await lists(address, folder.credential, trusting(authority)) == 0
        for tls in (None, trusting(stranger)):
            with pytest.raises(UnavailableError):
                await lists(address, folder.credential, tls)


async def test_clients_must_show_a_certificate(
    folder: Folder, tmp_path: Path, authority: Authority, stranger: Authority, server_pair: Pair
) -> None:
    config = folder.copy(
        tmp_path / "data", tls_client_roots=str(authority.roots), **shown(server_pair)
    )
    async with open_server(config) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        known = trusting(authority, authority.pair("client"))
        assert await lists(address, folder.credential, known) == 0
        for tls in (trusting(authority), trusting(authority, stranger.pair("client"))):
            with pytest.raises(UnavailableError):
                await lists(address, folder.credential, tls)
        # A certificate opens the connection; what may be done there is the key's to say.
        trusted = grpc.ssl_channel_credentials(
            known.root_certificates, known.private_key, known.certificate_chain
        )
        async with aio.secure_channel(address, trusted) as channel:
            stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as refused:
                await Caller("msk_none")(stub.ListMemories, pb.ListMemoriesRequest())
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_client_finds_its_certificate_in_the_environment(
    folder: Folder,
    tmp_path: Path,
    authority: Authority,
    server_pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = folder.copy(
        tmp_path / "data", tls_client_roots=str(authority.roots), **shown(server_pair)
    )
    pair = authority.pair("environment")
    async with open_server(config) as server:
        for variable, value in (
            ("MEMSVC_ADDRESS", f"localhost:{server.address.rpartition(':')[2]}"),
            ("MEMSVC_API_KEY", folder.credential),
            ("MEMSVC_TLS_ROOTS", str(authority.roots)),
            ("MEMSVC_TLS_CLIENT_CERTIFICATE", str(pair.certificate)),
            ("MEMSVC_TLS_CLIENT_KEY", str(pair.key)),
        ):
            monkeypatch.setenv(variable, value)
        async with AsyncClient.from_environment(retry=NO_RETRIES) as client:
            assert (await client.memories.list(timeout_s=5)).items == ()


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[WorkerProcess]:
    """A worker that speaks to those alone whom the authority knows."""
    pair = authority.pair("worker")
    running = WorkerProcess(
        tmp_path_factory.mktemp("worker"),
        "fake",
        f"--tls-certificate={pair.certificate}",
        f"--tls-private-key={pair.key}",
        f"--tls-client-roots={authority.roots}",
        listen="127.0.0.1:0",
    )
    yield running
    running.stop()


async def model_states(folder: Folder, data: Path, **settings: object) -> int:
    """How many models are served soon after the start."""
    config = folder.copy(data, **settings)
    async with serve(config, folder.credential) as served:
        asking = Asking(served.server, served.channel, served.as_operator)
        for _ in range(20):
            if asking.app.workers.served():
                break
            await asyncio.sleep(0.1)
        return len(asking.app.workers.served())


def towards_worker(roots: Path, pair: Pair) -> dict[str, object]:
    return {
        "worker_tls_roots": str(roots),
        "worker_tls_certificate": str(pair.certificate),
        "worker_tls_private_key": str(pair.key),
    }


async def test_a_worker_speaks_to_its_own_server_alone(
    folder: Folder,
    tmp_path: Path,
    worker: WorkerProcess,
    authority: Authority,
    stranger: Authority,
) -> None:
    address = {"worker_address": worker.address}
    own = towards_worker(authority.roots, authority.pair("memsvc"))
    assert await model_states(folder, tmp_path / "own", **address, **own) == 1
    unknown = towards_worker(authority.roots, stranger.pair("memsvc"))
    assert await model_states(folder, tmp_path / "unknown", **address, **unknown) == 0
    # Nor does the server speak to a worker that it has no reason to trust.
    deceived = towards_worker(stranger.roots, authority.pair("memsvc-2"))
    assert await model_states(folder, tmp_path / "deceived", **address, **deceived) == 0
    assert await model_states(folder, tmp_path / "plain", **address) == 0


async def test_files_that_are_not_there_are_said(
    folder: Folder, tmp_path: Path, server_pair: Pair
) -> None:
    config = folder.copy(tmp_path / "data", tls_certificate="/nowhere", tls_private_key="/nowhere")
    with pytest.raises(ServerStartError, match="nowhere"):
        async with open_server(config):
            pass
    config = folder.copy(tmp_path / "data", tls_client_roots="/nowhere", **shown(server_pair))
    with pytest.raises(ServerStartError, match="nowhere"):
        async with open_server(config):
            pass


@pytest.mark.parametrize(
    "values",
    [
        {"tls_client_roots": "a.pem"},
        {"worker_tls_roots": "a.pem"},
        {"worker_tls_certificate": "a.pem", "worker_tls_private_key": "a.key"},
    ],
)
def test_half_of_the_settings_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="tls_"):
        load_config(values)


def test_a_worker_without_all_of_its_files_does_not_start(
    tmp_path: Path, authority: Authority
) -> None:
    pair = authority.pair("half")
    worker = WorkerProcess(
        tmp_path, "fake", f"--tls-certificate={pair.certificate}", listen="127.0.0.1:0"
    )
    assert worker.wait() == 2
    assert worker.stop() == 2
