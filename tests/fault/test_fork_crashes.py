"""A server that dies in the middle of a fork or a restore: whole, or not there, after its start."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from memsvc.client import NO_RETRIES, Client, MemsvcError, Turn
from storage.failpoints import Failpoint
from tests.support.live import LiveServer, run_cli

_FORK = (
    Failpoint.KEYS_STORED,
    Failpoint.FORK_STORED,
    Failpoint.FORK_COMMITTED,
)


def client(server: LiveServer) -> Client:
    return Client(server.address, server.api_key, retry=NO_RETRIES)


def serve(server: LiveServer, point: Failpoint | None) -> None:
    server.spawn(*(("--set", f"failpoint={point.value}") if point else ()))
    server.wait_serving()


def test_forks_and_restores_are_whole_or_not_there(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data")
    server.start()
    with client(server) as calling:
        calling.memories.create("parent")
        for text in ("one", "two", "three"):
            calling.memory("parent").append([Turn("user", text)])
    server.stop()
    try:
        for point in _FORK:
            serve(server, point)
            with client(server) as calling:
                # What the crash before left was taken away, keys and shares with it.
                assert [memory.id for memory in calling.memories.iterate()] == ["parent"]
                with pytest.raises(MemsvcError):
                    calling.memory("parent").fork("child", request_id=point.value)
            assert server.ended() == -9
        serve(server, Failpoint.ROLLBACK_COMMITTED)
        with client(server) as calling:
            made = calling.memory("parent").fork("child", request_id=Failpoint.FORK_COMMITTED.value)
            assert (made.memory.id, made.memory.document_count) == ("child", 3)
            with pytest.raises(MemsvcError):
                calling.memory("parent").restore(1, request_id="back")
        assert server.ended() == -9
        serve(server, None)
        with client(server) as calling:
            restored = calling.memory("parent").restore(1, request_id="back")
            assert (restored.revision, restored.documents_removed) == (4, 2)
            assert calling.memories.get("parent").document_count == 1
            assert len(calling.memory("child").documents.list(full=True).items) == 3
            calling.memories.delete("parent")
            assert len(calling.memory("child").documents.list(full=True).items) == 3
    finally:
        server.stop()
    checked = run_cli("check", "--data-dir", server.folder)
    assert checked.returncode == 0, checked.stdout


def test_a_fork_is_whole_when_deletions_beside_it_are_cut(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data")

    def numbers() -> list[int]:
        with client(server) as calling:
            listed = calling.memory("child").documents.list(full=True).items
            return [one.number for one in listed if one.source is not None]

    try:
        serve(server, Failpoint.DELETE_EVICTED)
        with client(server) as calling:
            calling.memories.create("parent")
            for text in ("one", "two", "three"):
                calling.memory("parent").append([Turn("user", text)])
            calling.memory("parent").fork("child")
            with pytest.raises(MemsvcError):
                calling.memory("child").documents.delete([2])
        assert server.ended() == -9
        serve(server, Failpoint.DROP_EVICTED)
        assert numbers() == [1, 3]
        with client(server) as calling:
            assert calling.memories.get("parent").document_count == 3
            with pytest.raises(MemsvcError):
                calling.memories.delete("parent")
        assert server.ended() == -9
        serve(server, None)
        assert numbers() == [1, 3]
        with client(server) as calling:
            assert [memory.id for memory in calling.memories.iterate()] == ["child"]
        assert rows(server) == {"memories": 2, "lineages": 1, "documents": 2}
        with client(server) as calling:
            calling.memories.delete("child")
        assert rows(server) == {"memories": 0, "lineages": 0, "documents": 0}
    finally:
        server.stop()
    checked = run_cli("check", "--data-dir", server.folder)
    assert checked.returncode == 0, checked.stdout


def rows(server: LiveServer) -> dict[str, int]:
    """How many the catalog has."""
    with closing(sqlite3.connect(server.folder / "catalog.db")) as catalog:
        return {
            table: catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("memories", "lineages", "documents")
        }
