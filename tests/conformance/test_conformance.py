"""The conformance suite: a sound worker passes, each broken one fails with a clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_adapter.conformance import answers
from model_adapter.conformance.harness import connected
from model_adapter.conformance.report import Result
from model_adapter.conformance.suite import CHECKS, run
from storage.lmdb_store import LmdbStore
from tests.support import broken_workers as broken
from tests.support.live_worker import WorkerProcess

#: Limits that a text of a few words passes, and steps that a cancelled answer notices.
SPEC = "fake:max_document_tokens=3000,max_question_tokens=600,max_answer_tokens=120,step_ms=1"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """The sound one; a process of its own, because the suite writes the store that it reads."""
    running = WorkerProcess(tmp_path_factory.mktemp("data"), SPEC)
    yield running
    assert running.stop() == 0


async def _results(
    front: type[broken.Front], worker: WorkerProcess, folder: Path, only: str = ""
) -> list[Result]:
    async with (
        broken.worker_behind(front, worker.address, folder) as address,
        connected(address, worker.data, 0.02) as harness,
    ):
        return [result async for result in run(harness, only)]


async def test_a_sound_worker_passes_and_nothing_is_left(
    worker: WorkerProcess, tmp_path: Path
) -> None:
    results = await _results(broken.Front, worker, tmp_path)
    assert [result.name for result in results] == [name for name, _ in CHECKS]
    assert [result.line for result in results if result.outcome != "passed"] == []
    for tenant in (worker.data.root / "tenants").iterdir():
        store = LmdbStore(tenant)
        assert store.memories() == []
        store.close()


@pytest.mark.parametrize(
    ("front", "check", "line"),
    [
        (broken.Restless, "encode: same text", "differs by"),
        (broken.Careless, "identity", "Encode: not refused; FAILED_PRECONDITION MODEL_MISMATCH"),
        (broken.Miscounting, "encode: every document", "tokens make"),
        (broken.Poisoned, "encode: every document", "value_LCE holds what is no finite number"),
        (broken.Forgetful, "encode: every document", "documents [8] are not answered"),
        (broken.Truncating, "limits: long document", "max_document_tokens (3000) is encoded"),
        (broken.Deaf, "route: relevance", "every question has the same ranking"),
        (broken.Prophetic, "route: snapshot", "lie above last_number 4"),
        (broken.Indiscriminate, "route: filters", "do not match a filter: speakers"),
        (broken.Clinging, "route: deletion", "are found after they were deleted"),
        (broken.Heedless, "route: removed", "are found, which are said to be removed"),
        (broken.Mixing, "tenants", "another tenant's documents"),
        (broken.Abrupt, "query: events", "Finished came 0 times"),
        (broken.Moody, "query: repeatable", "the same question has two greedy answers"),
        (broken.Confused, "query: repeatable", "beside other questions"),
        (broken.Verbose, "query: limits", "tokens; 1 were allowed"),
    ],
)
async def test_a_broken_worker_fails_with_a_clear_line(
    front: type[broken.Front], check: str, line: str, worker: WorkerProcess, tmp_path: Path
) -> None:
    (result,) = await _results(front, worker, tmp_path, check)
    assert result.outcome == "failed"
    assert line in result.line, result.line
    assert "\n" not in result.line and len(result.line) < 200


async def test_work_that_goes_on_after_its_callers_left_is_seen(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_STOP_S", 0.05)
    (result,) = await _results(broken.Tireless, worker, tmp_path, "cancel: query")
    assert result.line == "failed  cancel: query: work goes on 0.05 s after its callers left"


async def test_without_the_data_folder_what_needs_it_is_skipped(worker: WorkerProcess) -> None:
    async with connected(worker.address, None, 0.02) as harness:
        outcomes = {result.name: result.outcome async for result in run(harness)}
    assert outcomes["encode: same text, same block"] == outcomes["identity"] == "passed"
    assert outcomes["route: ranking"] == outcomes["query: events"] == "skipped"
    assert "failed" not in outcomes.values()


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "model_adapter.conformance", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(worker: WorkerProcess) -> None:
    folder = str(worker.data.root)
    done = _command(worker.address, "--data-dir", folder, "--only", "encode", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["outcome"] for line in lines} == {"passed"} and len(lines) == 3
    part = _command(worker.address, "--only", "route: r")
    assert part.returncode == 3 and "needs --data-dir" in part.stdout
    assert _command(worker.address, "--only", "no such check").returncode == 1
