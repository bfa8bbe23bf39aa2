from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc import aio

from memsvc.server import ServerStartError, open_server
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import memory_service_pb2_grpc
from tests.support.served import Caller, Folder


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key for localhost and its own certificate."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with the openssl command")
    key, signed = tmp_path / "key.pem", tmp_path / "certificate.pem"
    wanted = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(signed)]
    subprocess.run([openssl, *wanted.split(), *named, *files], check=True, capture_output=True)
    return key, signed


async def test_serving_with_tls(
    folder: Folder, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    key, signed = certificate
    config = folder.copy(tmp_path / "data", tls_certificate=str(signed), tls_private_key=str(key))
    caller = Caller(folder.credential)
    async with open_server(config) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        trusted = grpc.ssl_channel_credentials(signed.read_bytes())
        async with aio.secure_channel(address, trusted) as channel:
            stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
            page = await caller(stub.ListMemories, pb.ListMemoriesRequest())
            assert not page.memories
        async with aio.insecure_channel(address) as channel:
            stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
            with pytest.raises(aio.AioRpcError):
                await caller(stub.ListMemories, pb.ListMemoriesRequest(), timeout=3)


async def test_a_certificate_that_is_not_there_is_said(folder: Folder, tmp_path: Path) -> None:
    config = folder.copy(tmp_path / "data", tls_certificate="/nowhere", tls_private_key="/nowhere")
    with pytest.raises(ServerStartError, match="nowhere"):
        async with open_server(config):
            pass
