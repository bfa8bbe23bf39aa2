"""How a worker process starts and ends."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from pathlib import Path

import grpc
import pytest
import torch
from grpc import aio

from model_adapter.engines import UnusableModelError, load_engine
from model_adapter.main import EXIT_UNUSABLE, parse_bytes
from storage.paths import DataFolder
from tests.support.live_worker import WorkerProcess, connected, error_info, rest

TENANT, MEMORY = "0d" * 16, "c0" * 16
BOAT = "Which boat?"


def listing(folder: Path) -> list[Path]:
    """Everything under it."""
    return sorted(folder.rglob("*"))


async def test_sigterm_lets_running_queries_finish(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "fake:step_ms=10")
    async with connected(worker) as client:
        await client.fill(TENANT, MEMORY, ["boat " * 40])
        call = client.query(client.ref(TENANT, MEMORY, 1), BOAT)
        for _ in range(5):
            await call.read()
        worker.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        with pytest.raises(aio.AioRpcError) as caught:
            await client.query(client.ref(TENANT, MEMORY, 1), BOAT).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_info(caught.value).reason == "DRAINING"
        assert (await rest(call))[-1].finished.answer_tokens == 40
    assert await asyncio.to_thread(worker.wait) == 0
    worker.stop()


async def test_a_query_longer_than_the_grace_is_ended(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "fake:step_ms=10", "--drain-grace=0.2")
    async with connected(worker) as client:
        await client.fill(TENANT, MEMORY, ["boat " * 250])
        call = client.query(client.ref(TENANT, MEMORY, 1), BOAT)
        await call.read()
        worker.process.send_signal(signal.SIGTERM)
        with pytest.raises(aio.AioRpcError) as caught:
            await rest(call)
        assert error_info(caught.value).reason == "DRAINING"
    assert await asyncio.to_thread(worker.wait, 3) == 0
    worker.stop()


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "fake", "--exit-with-parent")
    assert json.loads(worker.first_line) == {"ready": True, "address": worker.address}
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.wait() == 0
    worker.process.stdin = None
    worker.stop()
    lines = [json.loads(line) for line in worker.errors]
    assert lines[-1]["message"] == "drained"
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


async def test_kill_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nothing new on disk, no reader's slot that keeps pages, and the address is free again."""
    worker = WorkerProcess(tmp_path, "fake:step_ms=10")
    async with connected(worker) as client:
        await client.fill(TENANT, MEMORY, ["boat " * 250])
        before = listing(tmp_path)
        call = client.query(client.ref(TENANT, MEMORY, 1), BOAT)
        await call.read()
        assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(aio.AioRpcError):
            await rest(call)
        assert listing(tmp_path) == before
        environment = client.store(TENANT)._environment
        environment.free_stale_readers()
        assert environment.free_stale_readers() == 0
        again = WorkerProcess(tmp_path, "fake")
        async with connected(again) as other:
            text, cited = await other.answer(client.ref(TENANT, MEMORY, 1), BOAT)
            assert (len(text.split()), cited) == (250, [1])
        assert again.stop() == 0


def test_an_address_in_use(tmp_path: Path) -> None:
    serving = WorkerProcess(tmp_path, listen="127.0.0.1:0")
    assert serving.address.startswith("127.0.0.1:")
    assert not serving.address.endswith(":0")
    second = WorkerProcess(tmp_path, listen=serving.address)
    assert second.first_line == ""
    assert second.wait() == EXIT_UNUSABLE
    assert "can't start" in second.logs()
    assert "Traceback" not in second.logs()
    second.stop()
    assert serving.stop() == 0


@pytest.mark.parametrize("spec", ["fake:colour=red", "fake:step_ms=soon", "fake:step_ms", "none"])
def test_a_model_that_is_none(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableModelError):
        load_engine(spec, DataFolder(tmp_path), torch.device("cpu"), "auto")


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("123", 123), ("1K", 1024), ("2MiB", 2 * 2**20), ("3gb", 3 * 2**30)],
)
def test_byte_counts(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "1T", "G", "1 G"])
def test_byte_counts_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bytes(text)
