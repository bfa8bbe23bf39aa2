"""What is LMDB's own: growth, limits, other processes, kills, full disks."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from storage.block_records import BlockCodecs
from storage.codecs import Codec
from storage.lmdb_env import MapLimits
from storage.lmdb_store import LmdbOptions, LmdbReader, LmdbStore
from storage.store import (
    StorageError,
    StorageFullError,
    StoreBusyError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from tests.support.blocks import SHARED, make_block, make_document
from tests.support.store_process import ENCODING, GROUP, MEMORY, Process

MIB = 2**20
TINY = MapLimits(start_bytes=64 * 1024, max_bytes=4 * MIB, reserve_bytes=2 * MIB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants" / "aa"


@pytest.fixture
def reader(path: Path) -> Iterator[Process]:
    LmdbStore(path).close()
    process = Process("read", path)
    assert process.read() == "ready"
    yield process
    process.kill()


def big(number: int) -> str:
    return random.Random(number).randbytes(20_000).hex()


class TestGrowth:
    def test_the_map_grows_by_itself(self, path: Path) -> None:
        store = LmdbStore(path, LmdbOptions(MapLimits(start_bytes=64 * 1024)))
        assert store._environment.map_bytes == 64 * 1024
        for start in range(1, 200, 20):
            store.put_documents(
                MEMORY, [make_document(n, big(n)) for n in range(start, start + 20)]
            )
        assert store._environment.map_bytes > 4 * MIB
        assert [d.number for d in store.iter_documents(MEMORY)] == list(range(1, 201))
        store.close()

    def test_one_write_may_be_larger_than_the_map(self, path: Path) -> None:
        store = LmdbStore(path, LmdbOptions(MapLimits(start_bytes=64 * 1024)))
        store.put_documents(MEMORY, [make_document(n, big(n)) for n in range(1, 201)])
        assert len(store.document_numbers(MEMORY)) == 200
        store.close()

    def test_a_full_map_writes_nothing_and_can_be_freed(self, path: Path) -> None:
        store = LmdbStore(path, LmdbOptions(TINY))
        numbers: list[int] = []
        with pytest.raises(StorageFullError):
            for start in range(1, 10_000, 10):
                group = range(start, start + 10)
                store.put_documents(MEMORY, [make_document(n, big(n)) for n in group])
                numbers += group
        assert store.document_numbers(MEMORY) == numbers
        assert store.get_document(MEMORY, numbers[-1]) == make_document(
            numbers[-1], big(numbers[-1])
        )
        store.delete_documents(MEMORY, numbers[: len(numbers) // 2])
        store.put_documents(MEMORY, [make_document(50_000)])
        assert list(store.check()) == []
        store.close()
        higher = LmdbStore(path, LmdbOptions(MapLimits(max_bytes=64 * MIB)))
        higher.put_documents(MEMORY, [make_document(n, big(n)) for n in range(60_000, 60_100)])
        assert len(higher.document_numbers(MEMORY)) == len(numbers) - len(numbers) // 2 + 101
        higher.close()

    def test_threads_read_while_the_map_grows(self, path: Path) -> None:
        store = LmdbStore(path, LmdbOptions(MapLimits(start_bytes=64 * 1024)))
        store.put_documents(MEMORY, [make_document(n) for n in range(1, 50)])
        stop = threading.Event()
        faults: list[object] = []
        rounds = [0, 0]

        def read(index: int) -> None:
            while not stop.is_set():
                found = [d.number for d in store.iter_documents(MEMORY, 1, 49)]
                if found != list(range(1, 50)):
                    faults.append(found)
                rounds[index] += 1

        threads = [threading.Thread(target=read, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for start in range(100, 700, 20):
            store.put_documents(
                MEMORY, [make_document(n, big(n)) for n in range(start, start + 20)]
            )
        stop.set()
        for thread in threads:
            thread.join()
        assert not faults
        assert min(rounds) > 2
        store.close()

    def test_an_iterator_holds_no_transaction_while_it_waits(self, path: Path) -> None:
        """Else the growth below would wait for it for ever."""
        store = LmdbStore(path, LmdbOptions(MapLimits(start_bytes=64 * 1024)))
        store.put_documents(MEMORY, [make_document(n) for n in range(1, 400)])
        waiting = store.iter_documents(MEMORY)
        next(waiting)
        store.put_documents(MEMORY, [make_document(n, big(n)) for n in range(500, 700)])
        assert len(list(waiting)) == 598
        store.close()


class TestHandles:
    def test_there_is_one_writer(self, path: Path) -> None:
        store = LmdbStore(path)
        with pytest.raises(StoreBusyError):
            LmdbStore(path)
        process = Process("write", path)
        assert process.read().startswith("StoreBusyError")
        process.kill()
        store.close()
        LmdbStore(path).close()

    def test_one_process_opens_a_file_once(self, path: Path) -> None:
        store = LmdbStore(path)
        with pytest.raises(StoreBusyError):
            LmdbReader(path)
        store.close()

    def test_a_reader_makes_nothing(self, path: Path) -> None:
        with pytest.raises(StoreNotFoundError):
            LmdbReader(path)
        assert not path.exists()

    def test_a_file_of_something_else_is_an_error(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "data.mdb").write_bytes(b"not lmdb" * 2000)
        with pytest.raises(StorageError):
            LmdbReader(path)
        with pytest.raises(StorageError):
            LmdbStore(path)

    def test_a_folder_that_cannot_be_made_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError):
            LmdbStore(tmp_path / "file" / "tenant")

    def test_files_are_the_owners_alone(self, path: Path) -> None:
        LmdbStore(path).close()
        assert path.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}

    def test_many_records_are_deleted_in_runs(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("storage.lineage._DELETE_KEYS", 7)
        store = LmdbStore(path)
        store.put_documents(MEMORY, [make_document(n) for n in range(1, 50)])
        store.put_blocks(MEMORY, ENCODING, SHARED, [make_block(SHARED, n) for n in range(1, 50)])
        store.delete_encoding(MEMORY, ENCODING)
        assert store.encodings(MEMORY) == []
        store.delete_memory(MEMORY)
        assert store.memories() == []
        store.close()

    def test_codecs_may_change_between_openings(self, path: Path) -> None:
        for number, codec in enumerate(Codec, start=1):
            store = LmdbStore(path, LmdbOptions(codecs=BlockCodecs(codec, codec)))
            store.put_documents(MEMORY, [make_document(number)])
            store.put_blocks(MEMORY, ENCODING, SHARED, [make_block(SHARED, number)])
            store.close()
        store = LmdbStore(path)
        assert store.load_routing(MEMORY, ENCODING, SHARED).numbers_N.tolist() == [1, 2, 3, 4]
        assert list(store.check()) == []
        store.close()


class TestOtherProcess:
    def test_a_reader_sees_what_returned(self, path: Path, reader: Process) -> None:
        """Through growth of the file far beyond the map that the reader opened with."""
        store = LmdbStore(path, LmdbOptions(MapLimits(start_bytes=64 * 1024)))
        for last in (5, 50, 300):
            numbers = list(range(1, last + 1))
            store.put_documents(MEMORY, [make_document(n, big(n)) for n in numbers])
            store.put_blocks(MEMORY, ENCODING, SHARED, [make_block(SHARED, n) for n in numbers])
            assert json.loads(reader.ask()) == {
                "documents": numbers,
                "blocks": numbers,
                "problems": [],
            }
        store.delete_documents(MEMORY, list(range(2, 301)))
        assert json.loads(reader.ask())["documents"] == [1]
        store.close()

    def test_a_view_begins_on_a_store_that_has_grown_since_it_was_opened(
        self, path: Path, tmp_path: Path
    ) -> None:
        store = LmdbStore(path, LmdbOptions(MapLimits(start_bytes=64 * 1024)))
        store.put_documents(MEMORY, [make_document(1)])
        process = Process("copy", path, str(tmp_path / "copy"))
        assert process.read() == "ready"
        store.put_documents(MEMORY, [make_document(n, big(n)) for n in range(2, 201)])
        assert process.ask() == "copied"
        process.kill()
        store.close()
        copied = LmdbReader(tmp_path / "copy")
        assert [d.number for d in copied.iter_documents(MEMORY)] == list(range(1, 201))
        copied.close()

    def test_the_slots_of_killed_readers_are_freed(self, path: Path) -> None:
        store = LmdbStore(path)
        store.put_documents(MEMORY, [make_document(1)])
        process = Process("read", path)
        assert process.read() == "ready"
        process.ask()
        process.kill()
        assert store._environment.free_stale_readers() == 1
        assert store._environment.free_stale_readers() == 0
        store.close()


class TestKill:
    def test_a_killed_writer_leaves_whole_transactions(self, path: Path) -> None:
        """What it said is there; of what it did not say, all of a group is there or none."""
        chance = random.Random(7)
        said: dict[str, set[int]] = {"documents": set(), "blocks": set()}

        def note(line: str) -> None:
            what, last = line.split()
            said[what].update(range(int(last) - GROUP + 1, int(last) + 1))

        for _ in range(6):
            process = Process("write", path)
            for _ in range(chance.randint(1, 40)):
                note(process.read())
            time.sleep(chance.uniform(0, 0.004))
            process.child.kill()
            while line := process.read():  # What it said before it fell.
                note(line)
            process.kill()
            store = LmdbStore(path)
            documents = store.document_numbers(MEMORY)
            blocks = set(store.block_numbers(MEMORY, ENCODING))
            assert documents == list(range(1, len(documents) + 1))
            assert said["documents"] <= set(documents)
            assert len(documents) <= len(said["documents"]) + GROUP
            assert said["blocks"] <= blocks <= set(documents)
            for start in range(1, len(documents) + 1, GROUP):
                group = set(range(start, start + GROUP))
                assert group <= blocks or not group & blocks
            assert list(store.check()) == []
            said = {"documents": set(documents), "blocks": blocks}
            store.close()
        assert len(said["documents"]) > 50


class TestDiskFull:
    def test_a_file_that_may_not_grow(self, path: Path) -> None:
        """A limit on the size of files gives EFBIG where a full disk gives ENOSPC."""
        process = Process("fill", path, str(3 * MIB))
        report = json.loads(process.read())
        process.kill()
        assert report["last"] > 0
        assert report["before"] == list(range(1, report["last"] + 1))
        assert report["after"] == [*report["before"], 10_000_000]
        assert report["problems"] == []

    def test_an_error_of_the_commit_leaves_the_store_usable(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = LmdbStore(path)
        store.put_documents(MEMORY, [make_document(1)])

        def fail(transaction: lmdb.Transaction) -> None:
            transaction.put(b"x" * 41, b"x")
            raise lmdb.DiskError("mdb_txn_commit: No space left on device")

        with pytest.raises(StorageFullError):
            store._environment.write(fail)
        assert list(store.check()) == []
        store.put_documents(MEMORY, [make_document(2)])
        assert store.document_numbers(MEMORY) == [1, 2]
        store.close()

    def test_a_disk_that_comes_back(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The commit fails, and so does opening the environment anew; later it works again."""
        store = LmdbStore(path)
        store.put_documents(MEMORY, [make_document(1)])
        environment = store._environment

        def fail(transaction: lmdb.Transaction) -> None:
            raise lmdb.Error("mdb_txn_commit: Input/output error")

        def gone() -> lmdb.Environment:
            raise StoreUnavailableError("no disk")

        with monkeypatch.context() as patch:
            patch.setattr(environment, "_open", gone)
            for work in (fail, lambda _: None):
                with pytest.raises(StoreUnavailableError, match="no disk"):
                    environment.write(work)
            with pytest.raises(StoreUnavailableError):
                store.document_numbers(MEMORY)
        assert store.document_numbers(MEMORY) == [1]
        store.put_documents(MEMORY, [make_document(2)])
        assert list(store.check()) == []
        with monkeypatch.context() as patch:
            patch.setattr(environment, "_open", gone)
            with pytest.raises(StoreUnavailableError):
                environment.write(fail)
        store.close()
        again = LmdbStore(path)
        assert again.document_numbers(MEMORY) == [1, 2]
        again.close()

    def test_a_full_filesystem(self, tmp_path: Path) -> None:
        from tests.support.small_disk import small_disk

        with small_disk(tmp_path / "disk", 2 * MIB) as disk:
            store = LmdbStore(disk / "tenant")
            try:
                self.fill_and_free(store)
            finally:
                store.close()

    def fill_and_free(self, store: LmdbStore) -> None:
        last = 0
        with pytest.raises(StorageFullError):
            while last < 10_000:
                group = range(last + 1, last + 11)
                store.put_documents(MEMORY, [make_document(n, big(n)) for n in group])
                last += 10
        assert last > 0
        assert store.document_numbers(MEMORY) == list(range(1, last + 1))
        assert list(store.check()) == []
        store.delete_documents(MEMORY, list(range(1, last // 2)))
        store.put_documents(MEMORY, [make_document(20_000)])
        assert store.document_numbers(MEMORY)[-1] == 20_000
