"""The worker process: started, lost, replaced, stopped; queries while that happens."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from memsvc.config import load_config
from memsvc.workers.supervisor import SocketPlace, WorkerCommand, WorkerProcess, WorkerStartError
from storage.paths import DataFolder
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually
from tests.support.served import refused

LONG = "boiler " + "word " * 200


def _command(tmp_path: Path, model: str = "fake", timeout_s: float = 60.0) -> WorkerCommand:
    return WorkerCommand((f"--data-dir={tmp_path}", f"--model={model}"), timeout_s)


async def test_a_worker_starts_serves_and_stops(tmp_path: Path) -> None:
    place = SocketPlace(DataFolder(tmp_path))
    worker = await WorkerProcess.start(_command(tmp_path), place)
    assert psutil.pid_exists(worker.pid)
    assert place.path.stat().st_mode & 0o777 == 0o600
    await worker.stop()
    assert await worker.wait() == 0
    place.clear()
    assert not place.path.exists()


async def test_settings_at_fault_are_told_from_bad_luck(tmp_path: Path) -> None:
    place = SocketPlace(DataFolder(tmp_path))
    with pytest.raises(WorkerStartError) as caught:
        await WorkerProcess.start(_command(tmp_path, "/no/such/model"), place)
    assert caught.value.hopeless


async def test_a_worker_that_stays_silent_is_killed(tmp_path: Path) -> None:
    place = SocketPlace(DataFolder(tmp_path))
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(WorkerStartError, match="not ready"):
        await WorkerProcess.start(_command(tmp_path, timeout_s=0.05), place)
    assert {child.pid for child in psutil.Process().children()} <= before


async def test_a_deep_data_folder_gets_a_socket_elsewhere(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    place = SocketPlace(DataFolder(deep))
    assert len(os.fsencode(place.path)) < 108
    assert place.path.parent.stat().st_mode & 0o777 == 0o700
    place.clear()
    assert not place.path.parent.exists()


def test_every_setting_reaches_the_command(tmp_path: Path) -> None:
    config = load_config(
        {"data": tmp_path, "worker_model": "fake", "worker_threads": 3, "worker_dtype": "fp32"}
    )
    arguments = WorkerCommand.from_config(config).arguments
    assert "--threads=3" in arguments and "--dtype=fp32" in arguments
    assert "--routing-keys=auto" in arguments
    free = replace(config, worker_routing_budget=0, worker_routing_keys="int8")
    chosen = WorkerCommand.from_config(free).arguments
    assert "--routing-budget=auto" in chosen and "--routing-keys=int8" in chosen
    assert f"--routing-budget={config.worker_routing_budget}" in arguments
    assert f"--content-budget={config.worker_content_budget}" in arguments


def test_the_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from memsvc.workers.supervisor import *
from storage.paths import DataFolder
async def main():
    folder = pathlib.Path({str(tmp_path)!r})
    command = WorkerCommand((f"--data-dir={{folder}}", "--model=fake"), 60.0)
    worker = await WorkerProcess.start(command, SocketPlace(DataFolder(folder)))
    print(worker.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        child = psutil.Process(pid)
        parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([child], timeout=20)
    assert gone and not alive


async def test_a_lost_worker_is_replaced_and_models_say_so(served: Asking) -> None:
    first = await eventually(lambda: _other_than(served, 0))
    seen = served.app.workers.generation
    os.kill(first, signal.SIGKILL)
    await served.app.workers.changed(seen)
    assert served.app.workers.find("fake") is None
    second = await eventually(lambda: _other_than(served, first))
    assert psutil.pid_exists(second)
    memory = await served.create()
    await served.append(memory.name, "a boiler")
    assert (await served.ask(memory.name, "boiler")).cited == [1]


async def _other_than(served: Asking, pid: int) -> int | None:
    found = served.app.workers.find("fake") and served.app.workers.supervised_pid
    return found if found and found != pid else None


async def test_a_query_whose_worker_dies_midway_may_be_repeated(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=30") as served:
        memory = await served.create()
        await served.append(memory.name, LONG)
        call = served.stream(memory.name, "boiler?")
        async for event in call:
            if event.WhichOneof("event") == "text":
                break
        await served.kill_worker()
        began = time.monotonic()
        found = await refused(call)
        assert time.monotonic() - began < 5
        assert (found.code, found.reason) == ("UNAVAILABLE", "WORKER_UNAVAILABLE")
        assert found.retry_s is not None
        answer = await served.ask(memory.name, "boiler?")
        assert answer.cited == [1]


async def test_a_query_that_had_no_answer_yet_is_moved_to_the_next_worker(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=600") as served:
        memory = await served.create()
        await served.append(memory.name, "Olga repaired the boiler")
        await served.ready(memory.name)
        asking = asyncio.create_task(
            served.ask(memory.name, "boiler?", options={"max_answer_tokens": 1})
        )
        await asyncio.sleep(0.3)
        await served.kill_worker()
        answer = await asking
        assert answer.cited == [1]


async def test_without_a_worker_a_query_waits_no_longer_than_it_may(start: Serve) -> None:
    async with start(worker_address="unix:/nonexistent/worker.sock") as served:
        memory = await served.create()
        await served.append(memory.name, "a boiler")
        began = time.monotonic()
        found = await refused(served.stream(memory.name, "boiler?", timeout=2.5))
        assert time.monotonic() - began < 2.5
        assert found.reason == "WORKER_UNAVAILABLE" and found.retry_s is not None


async def test_a_worker_that_runs_apart_serves_too(start: Serve, tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    place = SocketPlace(DataFolder(tmp_path))
    worker = await WorkerProcess.start(_command(folder.root), place)
    try:
        async with start(worker_address=place.address) as served:
            memory = await served.create()
            await served.append(memory.name, "a boiler")
            assert (await served.ask(memory.name, "boiler")).cited == [1]
            await served.delete_documents(memory.name, 1)
            assert (await served.ask(memory.name, "boiler")).cited == []
        assert psutil.pid_exists(worker.pid)
    finally:
        await worker.stop()


async def test_closing_the_server_stops_its_worker(start: Serve) -> None:
    async with start() as served:
        pid = await served.worker_pid()
    assert not psutil.pid_exists(pid)
