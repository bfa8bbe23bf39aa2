"""Failpoints: each is come by when its step is taken, and a process dies where it is told to."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memsvc.backup import back_up, restore
from memsvc.config import load_config
from memsvc.reconcile import reconcile
from memsvc.settings import ConfigError
from memsvc.v1 import memory_service_pb2 as pb
from storage.catalog import migrate
from storage.catalog.database import sqlite_url
from storage.failpoints import Failpoint, arm, armed, parse, reach
from storage.store import EncodingId, MemoryUid, TenantStore
from tests.support.answers import Asking, asking
from tests.support.live import run_cli
from tests.support.served import make_folder

ROOT = Path(__file__).parents[2]


async def export_and_import(served: Asking, memory: str) -> str:
    """Returns the copy's name."""
    request = pb.ExportMemoryRequest(name=memory)
    export = served.as_operator(served.memories.ExportMemory, request)
    data = b"".join([reply.data async for reply in export])

    def messages() -> Iterator[pb.ImportMemoryRequest]:
        yield pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header())
        yield pb.ImportMemoryRequest(data=data)

    reply = await served.as_operator(served.memories.ImportMemory, messages())
    name: str = reply.memory.name
    return name


async def one_of_everything(served: Asking) -> None:
    """Every step that has a failpoint, once at least."""
    memory = await served.create()
    await served.append(memory.name, *(f"fact {n}" for n in range(1, 6)))
    await served.ready(memory.name)
    await served.delete_documents(memory.name, 2)
    fork = await served.fork(memory.name)
    await served.restore(fork.memory.name, fork.memory.revision)
    copy = await export_and_import(served, memory.name)
    await served.delete(copy)
    row = await served.row(memory.name)
    model = await served.app.catalog.default_model()
    assert model is not None
    await served.app.encoding.rebuild(row, model, [3])
    await served.ready(memory.name)
    # What a crash leaves, and the mending of it.
    await served.app.encoding.drain()
    await served.app.catalog.commit_delete_documents(row.uid, row.revision, [4], None)
    uid, encoding = bytes.fromhex(row.uid), bytes.fromhex(model.identity)[:16]

    def lose_a_block(store: TenantStore) -> None:
        store.delete_blocks(MemoryUid(uid), EncodingId(encoding), [5])

    await served.app.stores.run(row.tenant_uid, lose_a_block)
    await reconcile(served.app)


async def test_every_point_is_come_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen: set[Failpoint] = set()
    with armed(seen.add):
        migrate(sqlite_url(tmp_path / "other.db"))
    folder = await asyncio.to_thread(make_folder, tmp_path / "template")
    async with asking(folder, tmp_path / "data") as served:
        with armed(seen.add):
            await one_of_everything(served)
        config = served.app.config
    with armed(seen.add):
        await asyncio.to_thread(back_up, config, tmp_path / "backup")
        new = replace(config, data=tmp_path / "new", root_key_file=str(config.root_key_path))
        await asyncio.to_thread(restore, new, tmp_path / "backup")
    assert set(Failpoint) - seen == set()


def test_each_point_stands_in_the_code_once() -> None:
    code = "".join(
        path.read_text() for part in ("memsvc", "storage") for path in (ROOT / part).rglob("*.py")
    )
    placed = re.findall(r"reach\(Failpoint\.(\w+)\)", code)
    assert {point.name for point in Failpoint} == set(placed)


@pytest.mark.parametrize(("setting", "passes"), [("append-stored", 1), ("append-stored:3", 3)])
def test_a_process_dies_at_the_pass_it_is_told(setting: str, passes: int) -> None:
    code = (
        "import sys; from storage.failpoints import *; arm(die_at(*parse(sys.argv[1])))\n"
        "for n in range(9): print(n, flush=True); reach(Failpoint.APPEND_LOCKED); "
        "reach(Failpoint.APPEND_STORED)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, setting], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -9
    assert len(done.stdout.split()) == passes


def test_off_again() -> None:
    seen: list[Failpoint] = []
    with armed(seen.append):
        reach(Failpoint.APPEND_STORED)
    reach(Failpoint.APPEND_STORED)
    arm(None)
    assert seen == [Failpoint.APPEND_STORED]


def test_a_setting_is_read_or_refused() -> None:
    assert parse("append-stored") == (Failpoint.APPEND_STORED, 1)
    assert parse("append-stored:3") == (Failpoint.APPEND_STORED, 3)
    for wrong in ("nowhere", "append-stored:0", "append-stored:x", ":"):
        with pytest.raises(ConfigError, match="failpoint"):
            load_config({"failpoint": wrong})


@pytest.mark.parametrize("point", [Failpoint.MIGRATE_UNCOMMITTED, Failpoint.MIGRATE_COMMITTED])
def test_setting_up_a_folder_can_die_and_be_done_again(tmp_path: Path, point: Failpoint) -> None:
    folder = tmp_path / "data"
    died = run_cli("init", "--data-dir", folder, extra={"MEMSVC_FAILPOINT": point.value})
    assert died.returncode == -9
    again = run_cli("init", "--data-dir", folder)
    assert again.returncode == 0, again.stderr
    assert run_cli("check", "--data-dir", folder).returncode == 0
