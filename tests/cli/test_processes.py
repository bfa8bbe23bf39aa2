"""Commands that are or start processes: worker, model pull, and a server with TLS."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from memsvc.cli.exits import ExitCode
from memsvc.client import TLS, Client, RetryPolicy, UnavailableError
from tests.support.live import LiveServer, LiveWorker, run_cli

ROOT = Path(__file__).parents[2]


def test_a_worker_that_runs_apart(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    worker = LiveWorker(folder)
    server = LiveServer(folder, options=("--worker-address", worker.address))
    worker.start()
    try:
        server.start()
        server.wait_model()
        assert server.workers() == []
        assert server.stop() == 0
    finally:
        server.kill()
        assert worker.stop() == 0


def test_the_address_file_lives_as_long_as_the_server(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data")
    server.start()
    try:
        assert (tmp_path / "data/address").read_text().strip() == server.address
    finally:
        assert server.stop() == 0
    assert not (tmp_path / "data/address").exists()


def test_model_pull_says_what_it_fetched() -> None:
    # The checkout's own cache, which the demo shares: fetched once, checked each time.
    done = run_cli("model", "pull", "--data-dir", ROOT / ".data", "--json")
    assert done.returncode == ExitCode.OK, done.stderr
    pulled = json.loads(done.stdout)
    assert Path(pulled["path"]).stat().st_size == pulled["bytes"]


def test_model_pull_fails_with_its_exit_code(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert run_cli("model", "pull", "--data-dir", blocked).returncode == ExitCode.FAILED


def test_a_server_with_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with the openssl command")
    key, signed = tmp_path / "key.pem", tmp_path / "certificate.pem"
    wanted = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(signed)]
    subprocess.run([openssl, *wanted.split(), *named, *files], check=True, capture_output=True)
    options = ["--set", f"tls_certificate={signed}", "--set", f"tls_private_key={key}"]
    server = LiveServer(tmp_path / "data", options=options)
    server.start()
    try:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        with Client(address, server.api_key, tls=TLS(signed.read_bytes())) as client:
            assert client.memories.list().items == ()
        few = RetryPolicy(attempts=2)
        with Client(address, server.api_key, retry=few) as plain, pytest.raises(UnavailableError):
            plain.memories.list()
        told = run_cli(
            *("memory", "list", "--data-dir", server.folder, "--address", address),
            extra={"MEMSVC_TLS_ROOTS": str(signed)},
        )
        assert told.stdout == b"There are no memories.\n", told.stderr
    finally:
        server.stop()
