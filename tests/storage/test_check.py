"""The check: damage that was put in is named, soundness is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from storage.block_records import (
    BlockCodecs,
    Record,
    block_records,
    document_record,
    encoding_record,
)
from storage.check import (
    check_data_folder,
    check_store,
    check_structure,
    require_sound_structure,
)
from storage.keys import Kind, block_key, document_key, encoding_key
from storage.lmdb_store import LmdbStore
from storage.paths import DataFolder
from storage.store import Problem, StoreDamagedError
from storage.verify import find_problems
from tests.support.blocks import (
    SEPARATE,
    SHARED,
    encoding_id,
    make_block,
    make_document,
    memory_uid,
)

A, ONE = memory_uid(1), encoding_id(1)
ROUTING_2 = block_key(A, Kind.ROUTING, ONE, 2)
CONTENT_2 = block_key(A, Kind.CONTENT, ONE, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound store of three memories."""
    path = DataFolder(tmp_path).tenant("cafe")
    store = LmdbStore(path)
    for memory in (A, memory_uid(2), memory_uid(3)):
        store.put_documents(memory, [make_document(n) for n in range(1, 6)])
        store.put_blocks(memory, ONE, SHARED, [make_block(SHARED, n) for n in range(1, 5)])
    store.close()
    return path


@contextmanager
def behind_its_back(path: Path) -> Iterator[lmdb.Transaction]:
    environment = lmdb.open(str(path), map_size=64 * 2**20)
    with environment.begin(write=True) as transaction:
        yield transaction
    environment.close()


def test_a_sound_store(path: Path) -> None:
    report = check_store(path)
    assert check_structure(path) == []
    assert report.sound
    assert report.structure_checked
    assert (report.tenant, report.memories, report.documents, report.blocks) == ("cafe", 3, 15, 12)
    assert report.record_bytes > 12 * SHARED.block_bytes(5)


def test_beside_a_live_writer(path: Path) -> None:
    import fcntl

    with (path / "writer.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check_structure(path) is None
        report = check_store(path)
    assert report.sound
    assert not report.structure_checked


def damage(transaction: lmdb.Transaction) -> None:
    value = bytearray(transaction.get(CONTENT_2, b""))
    value[-1] ^= 1
    transaction.put(CONTENT_2, bytes(value))


def swap(transaction: lmdb.Transaction) -> None:
    other = block_key(A, Kind.ROUTING, ONE, 3)
    left, right = transaction.get(ROUTING_2, b""), transaction.get(other, b"")
    transaction.put(ROUTING_2, right)
    transaction.put(other, left)


def other_tokens(transaction: lmdb.Transaction) -> None:
    """Whole by itself, but of other tokens than its routing keys."""
    _, content = block_records(A, ONE, SHARED, make_block(SHARED, 2, 50), BlockCodecs())
    transaction.put(*content)


def other_layout(transaction: lmdb.Transaction) -> None:
    halves = block_records(A, ONE, SEPARATE, make_block(SEPARATE, 2), BlockCodecs())
    for half in halves:
        transaction.put(*half)


def put_newer(transaction: lmdb.Transaction) -> None:
    key, value = document_record(A, make_document(2))
    transaction.put(key, value[:4] + b"\x03" + value[5:])


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (damage, [(CONTENT_2, "damaged")]),
        (lambda t: t.delete(CONTENT_2), [(ROUTING_2, "half-block")]),
        (lambda t: t.delete(ROUTING_2), [(CONTENT_2, "half-block")]),
        (lambda t: t.delete(document_key(A, 2)), [(ROUTING_2, "no-document")]),
        (swap, [(ROUTING_2, "damaged"), (block_key(A, Kind.ROUTING, ONE, 3), "damaged")]),
        (other_tokens, [(CONTENT_2, "damaged")]),
        (other_layout, [(ROUTING_2, "foreign"), (CONTENT_2, "foreign")]),
        (put_newer, [(document_key(A, 2), "foreign")]),
        (lambda t: t.put(b"stray", b"x"), [(b"stray", "stray-key")]),
        (lambda t: t.put(document_key(A, 9), b""), [(document_key(A, 9), "damaged")]),
        (
            lambda t: t.delete(encoding_key(A, ONE)),
            [(block_key(A, Kind.ROUTING, ONE, n), "no-layout") for n in range(1, 5)],
        ),
        (
            lambda t: t.put(encoding_key(A, ONE), encoding_record(A, ONE, SHARED)[1][:-1]),
            [(encoding_key(A, ONE), "damaged")],
        ),
    ],
)
def test_each_kind_of_damage(
    path: Path,
    change: Callable[[lmdb.Transaction], object],
    problems: list[tuple[bytes, str]],
) -> None:
    with behind_its_back(path) as transaction:
        change(transaction)
    findings = check_store(path).findings
    assert {(f.key, f.problem.value) for f in findings} == {(k.hex(), p) for k, p in problems}
    assert all(finding.detail for finding in findings)


def test_a_file_whose_pages_are_damaged(path: Path) -> None:
    data = bytearray((path / "data.mdb").read_bytes())
    for page in range(2 * 4096, len(data), 4096):
        data[page + 10 : page + 16] = b"\xff" * 6
    (path / "data.mdb").write_bytes(data)
    assert check_structure(path)
    report = check_store(path)
    assert {finding.problem for finding in report.findings} == {Problem.DAMAGED}


@pytest.mark.parametrize("data", [b"", b"nothing of LMDB" * 1000])
def test_a_file_of_something_else(path: Path, data: bytes) -> None:
    (path / "data.mdb").write_bytes(data)
    report = check_store(path)
    assert [finding.problem for finding in report.findings] == [Problem.DAMAGED]


def test_a_whole_data_folder(path: Path, tmp_path: Path) -> None:
    data = DataFolder(tmp_path)
    LmdbStore(data.tenant("beef")).close()
    (data.tenant("beef").parent / "not-a-store").mkdir()
    reports = list(check_data_folder(data))
    assert [(report.tenant, report.sound) for report in reports] == [("beef", True), ("cafe", True)]
    assert list(check_data_folder(DataFolder(tmp_path / "elsewhere"))) == []


def test_whoever_opens_a_file_to_write_is_warned(path: Path) -> None:
    require_sound_structure(path)
    require_sound_structure(path.parent / "nothing-there")
    data = path / "data.mdb"
    sound = data.read_bytes()
    metas = [sound[page + 128 : page + 152] for page in (0, 4096)]
    newest = max(metas, key=lambda meta: int.from_bytes(meta[16:24], "little"))
    root = 4096 * int.from_bytes(newest[:8], "little")
    data.write_bytes(sound[: root + 12] + b"\xff\xff" + sound[root + 14 :])
    with pytest.raises(StoreDamagedError, match="cafe is damaged"):
        require_sound_structure(path)
    (path / "writer.lock").unlink()
    with pytest.raises(StoreDamagedError):
        require_sound_structure(path)


@pytest.mark.parametrize("size", [0, 8192])
def test_a_file_that_no_commit_reached_is_made_anew(path: Path, size: int) -> None:
    (path / "data.mdb").write_bytes(bytes(size))
    require_sound_structure(path)
    store = LmdbStore(path)
    assert store.memories() == []
    store.close()


def test_a_deletion_in_the_middle_of_a_check_is_no_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LmdbStore(path)
    numbers = range(1, 401)
    store.put_documents(A, [make_document(n) for n in numbers])
    store.put_blocks(A, ONE, SHARED, [make_block(SHARED, n) for n in numbers])

    def records() -> Iterator[Record]:
        """Deletes a block between its routing keys and its content, a document before both."""
        for index, record in enumerate(read()):
            if index == 450:
                store.delete_documents(A, [20, 390])
            yield record

    read = store.iter_raw
    monkeypatch.setattr(store, "iter_raw", records)
    seen_at_once = {finding.problem for finding in find_problems(records())}
    assert seen_at_once == {Problem.HALF_BLOCK}
    store.put_documents(A, [make_document(n) for n in (20, 390)])
    store.put_blocks(A, ONE, SHARED, [make_block(SHARED, n) for n in (20, 390)])
    assert list(store.check()) == []
    store.close()
