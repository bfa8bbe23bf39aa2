"""`memsvc check` notices what is lost, damaged or left over."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memsvc.cli.exits import ExitCode
from memsvc.cli.main import build
from memsvc.client import Turn
from storage.lmdb_store import LmdbStore
from storage.paths import DataFolder
from storage.store import MemoryUid
from tests.support.keys import open_store
from tests.support.live import live_server


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one memory of five encoded documents, and no server on it."""
    folder: Path = tmp_path_factory.mktemp("check") / "data"
    with live_server(folder) as server, server.client() as client:
        client.memories.create("kept")
        client.memory("kept").append([Turn("user", f"fact {n} of kept") for n in range(5)])
        client.memory("kept").ask("Is everything encoded?")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy", ignore=shutil.ignore_patterns("*.sock")))


@contextmanager
def opened(folder: Path) -> Iterator[tuple[LmdbStore, MemoryUid]]:
    (tenant,) = (folder / "tenants").iterdir()
    store = open_store(DataFolder(folder), tenant.name)
    try:
        (memory,) = store.memories()
        yield store, memory
    finally:
        store.close()


def check(folder: Path, code: ExitCode) -> list[Any]:
    """The findings."""
    done = CliRunner().invoke(build(), ["check", "--data-dir", str(folder), "--json"])
    assert done.exit_code == code, done.output
    *findings, counts = map(json.loads, done.stdout.splitlines())
    assert counts["damage"] + counts["leftovers"] == len(findings)
    return [finding["finding"] for finding in findings]


def test_a_sound_folder(folder: Path) -> None:
    assert check(folder, ExitCode.OK) == []


def test_a_lost_document_and_its_blocks(folder: Path) -> None:
    with opened(folder) as (store, memory):
        store.delete_documents(memory, [2])
    problems = {finding["problem"] for finding in check(folder, ExitCode.FINDINGS)}
    assert problems == {"document-missing", "block-missing"}


def test_a_lost_block(folder: Path) -> None:
    with opened(folder) as (store, memory):
        (encoding,) = store.encodings(memory)
        store.delete_blocks(memory, encoding, [4])
    (finding,) = check(folder, ExitCode.FINDINGS)
    assert finding["problem"] == "block-missing"
    assert finding["detail"].endswith(": 4")


def test_a_lost_environment(folder: Path) -> None:
    for tenant in (folder / "tenants").iterdir():
        shutil.rmtree(tenant)
    (finding,) = check(folder, ExitCode.FINDINGS)
    assert finding["detail"] == "5 documents: 1, 2, 3, 4, 5"


def test_a_damaged_record(folder: Path) -> None:
    with opened(folder) as (store, _):
        values = [bytes(value) for _, value in store.iter_raw()]
    (tenant,) = (folder / "tenants").iterdir()
    data = tenant / "data.mdb"
    content = bytearray(data.read_bytes())
    # Old pages may hold a copy of it; every copy is changed.
    spoiled = values[2][:-1] + bytes([values[2][-1] ^ 1])
    assert content.count(values[2]) >= 1
    data.write_bytes(content.replace(values[2], spoiled))
    (finding,) = check(folder, ExitCode.FINDINGS)
    assert (finding["problem"], finding["severity"]) == ("damaged", "damage")


def test_what_a_crash_leaves_is_no_damage(folder: Path) -> None:
    with opened(folder) as (store, memory):
        document = store.get_document(memory, 5)
        store.put_documents(memory, [replace(document, number=6)])
        store.put_documents(MemoryUid(bytes(16)), [document])
    findings = check(folder, ExitCode.OK)
    assert {finding["severity"] for finding in findings} == {"leftover"}
    assert len(findings) == 2


def test_a_memory_being_deleted_is_no_damage(folder: Path) -> None:
    with sqlite3.connect(folder / "catalog.db") as catalog:
        catalog.execute("UPDATE memories SET state = 'deleting'")
    catalog.close()
    with opened(folder) as (store, memory):
        store.delete_documents(memory, [1, 2])
    (finding,) = check(folder, ExitCode.OK)
    assert "3 documents of a deleted memory" in finding["detail"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(build(), ["check", "--data-dir", str(tmp_path / "none"), "--json"])
    assert done.exit_code == ExitCode.CONFIGURATION


def verify(folder: Path, code: ExitCode, *heads: str) -> list[str]:
    """Lines of `memsvc audit verify`."""
    options = [part for head in heads for part in ("--head", head)]
    done = CliRunner().invoke(build(), ["audit", "verify", *options, "--data-dir", str(folder)])
    assert done.exit_code == code, done.output
    return done.stdout.splitlines()


def test_an_altered_audit_trail(folder: Path) -> None:
    (head,) = verify(folder, ExitCode.OK)
    assert verify(folder, ExitCode.OK, head) == [head]
    with sqlite3.connect(folder / "catalog.db") as catalog:
        catalog.execute("DROP TRIGGER audit_no_update")
        catalog.execute("UPDATE audit SET actor = 'nobody' WHERE sequence = 1")
    (line,) = verify(folder, ExitCode.FINDINGS)
    assert line.endswith("=entry 1 is not as it was written")
    (finding,) = check(folder, ExitCode.FINDINGS)
    assert finding["problem"] == "audit-altered"


def test_an_audit_trail_that_was_cut_off(folder: Path) -> None:
    (head,) = verify(folder, ExitCode.OK)
    with sqlite3.connect(folder / "catalog.db") as catalog:
        catalog.execute("DROP TRIGGER audit_no_delete")
        catalog.execute("DELETE FROM audit")
    assert verify(folder, ExitCode.OK) == []
    (line,) = verify(folder, ExitCode.FINDINGS, head)
    assert line.endswith("is not the one that was noted")
    assert verify(folder, ExitCode.USAGE, "nonsense") == []
