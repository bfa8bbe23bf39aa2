"""Backups taken beside a server that writes: what is restored is one moment of every memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memsvc.backup import MANIFEST, BackupError, back_up, restore
from memsvc.check import check_data
from memsvc.client import AsyncClient, Conversation, Turn
from memsvc.config import Config, load_config
from memsvc.setup import DataFolderError, initialise
from storage.catalog import Catalog, CatalogError
from storage.crypto import RootKeyError
from storage.store import MemoryUid
from tests.support.keys import open_store
from tests.support.live import LiveServer, run_cli
from tests.support.postgres import PostgresForTests, run_postgres
from tests.support.served import Folder, make_folder, serve

#: Texts of a memory by revision.
History = dict[int, list[str]]


async def write(client: AsyncClient, memory: str, history: History, stop: asyncio.Event) -> None:
    """Appends and deletes, alone in its memory, and writes down each revision's content."""
    live: dict[str, str] = {}
    number = 0
    while not stop.is_set():
        number += 1
        texts = [f"{memory} fact {number}-{n}" for n in range(1 + number % 3)]
        written = await client.memory(memory).append([Turn("user", text) for text in texts])
        live |= dict(zip(written.documents, texts, strict=True))
        history[written.revision] = list(live.values())
        if number % 3 == 0:
            gone = list(live)[number % len(live)]
            revision = await client.memory(memory).documents.delete([gone])
            del live[gone]
            history[revision] = list(live.values())


async def read(client: AsyncClient, memory: str) -> list[str]:
    texts = []
    async for document in client.memory(memory).documents.iterate(full=True):
        assert isinstance(document.source, Conversation)
        texts += [turn.text for turn in document.source.turns]
    return texts


def restored(backup: Path, original: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(original / "root.key", folder)
    done = run_cli("restore", backup, "--data-dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["damage"] == []


async def test_a_backup_beside_writers_is_of_one_moment(tmp_path: Path) -> None:
    data = tmp_path / "data"
    server = await asyncio.to_thread(LiveServer, data)
    await asyncio.to_thread(server.start)
    histories: dict[str, History] = {f"memory-{n}": {0: []} for n in range(3)}
    backups = [tmp_path / f"backup-{n}" for n in range(2)]
    stop = asyncio.Event()
    try:
        async with (
            AsyncClient(server.address, server.api_key) as client,
            asyncio.TaskGroup() as group,
        ):
            for memory, history in histories.items():
                await client.memories.create(memory)
                group.create_task(write(client, memory, history, stop))
            for backup in backups:
                await asyncio.sleep(0.3)
                before = {memory: max(history) for memory, history in histories.items()}
                done = await asyncio.to_thread(run_cli, "backup", backup, "--data-dir", data)
                assert done.returncode == 0, done.stderr
                # They did not stand still meanwhile.
                assert all(max(histories[memory]) > before[memory] for memory in before)
            stop.set()
    finally:
        await asyncio.to_thread(server.stop)
    await asyncio.to_thread(restored, backups[1], data, tmp_path / "restored")
    assert (backups[0] / MANIFEST).exists()
    again = await asyncio.to_thread(LiveServer, tmp_path / "restored")
    await asyncio.to_thread(again.start)
    try:
        async with AsyncClient(again.address, server.api_key) as client:
            for memory, history in histories.items():
                row = await client.memories.get(memory)
                assert row.revision in history
                assert await read(client, memory) == history[row.revision]
            answer = await client.memory("memory-0").ask("Which fact?")
            assert answer.usage is not None
            assert answer.usage.routed_documents == len(await read(client, "memory-0"))
    finally:
        await asyncio.to_thread(again.stop)
    settings = load_config({"data": tmp_path / "restored"})
    assert [f async for f in check_data(settings)] == []


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    yield from run_postgres()


@pytest.mark.parametrize("back_to", ["sqlite", "postgres"])
def test_a_catalog_in_postgresql(tmp_path: Path, postgres: PostgresForTests, back_to: str) -> None:
    first, second = (postgres.url(postgres.make_database()) for _ in range(2))
    config = load_config({"data": tmp_path / "data", "database_url": first})
    credential = initialise(config).credential
    assert credential is not None
    folder = Folder(config.data, credential)

    async def fill() -> None:
        async with serve(folder.copy(config.data, database_url=first), credential) as served:
            await served.create("teas")
            await served.append("memories/teas", "one", "two")

    asyncio.run(fill())
    back_up(config, tmp_path / "backup")
    other = replace(
        config,
        data=tmp_path / "other",
        database_url=second if back_to == "postgres" else "",
        root_key_file=str(config.root_key_path),
    )
    assert restore(other, tmp_path / "backup").damage == ()
    assert other.folder.catalog.exists() == (back_to == "sqlite")
    if back_to == "postgres":
        with pytest.raises(CatalogError, match="not empty"):
            restore(replace(other, data=tmp_path / "third"), tmp_path / "backup")

    async def texts() -> list[str]:
        settings = {"database_url": other.database_url, "root_key_file": other.root_key_file}
        config = Folder(other.data, credential).copy(other.data, **settings)
        async with serve(config, credential) as served:
            await served.append("memories/teas", "three")
            return await served.texts("memories/teas")

    assert asyncio.run(texts()) == ["one", "two", "three"]


class Kept:
    """A folder with one memory of five texts, and a backup of it."""

    def __init__(self, folder: Folder, path: Path) -> None:
        self.config = folder.copy(path / "data")
        self.credential = folder.credential
        asyncio.run(self._fill())
        self.backup = path / "backup"
        self.outcome = back_up(self.config, self.backup)
        self.new = replace(
            self.config, data=path / "new", root_key_file=str(self.config.root_key_path)
        )

    async def _fill(self) -> None:
        async with serve(self.config, self.credential) as served:
            await served.create("teas")
            await served.append("memories/teas", *(f"fact {n}" for n in range(5)))


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(make_folder(tmp_path / "template"), tmp_path)


def test_it_is_private_and_without_the_root_key(kept: Kept) -> None:
    files = [path for path in kept.backup.rglob("*") if path.is_file()]
    assert kept.outcome.files == len(files) - 1
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    assert kept.backup.stat().st_mode & 0o077 == 0
    assert not [path for path in files if path.name in ("root.key", "lock.mdb", "writer.lock")]
    root = kept.config.root_key_path.read_bytes().strip()
    assert not any(root in path.read_bytes() for path in files)


def test_nothing_is_overwritten(kept: Kept) -> None:
    with pytest.raises(BackupError, match="exists already"):
        back_up(kept.config, kept.backup)
    with pytest.raises(DataFolderError, match="not empty"):
        restore(kept.config, kept.backup)
    with pytest.raises(DataFolderError, match="memsvc init"):
        back_up(kept.new, kept.backup.with_name("of-nothing"))
    assert not list(kept.backup.parent.glob(".*partial"))


def test_the_right_root_key_is_needed(kept: Kept) -> None:
    without = replace(kept.new, root_key_file="")
    with pytest.raises(BackupError, match="put its root key"):
        restore(without, kept.backup)
    assert not without.data.exists()
    other = make_folder(kept.backup.parent / "other")
    with pytest.raises(RootKeyError):
        restore(replace(kept.new, root_key_file=str(other.root / "root.key")), kept.backup)


def _rename(manifest: str) -> str:
    return manifest.replace('"server.key"', '"../server.key"')


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda manifest: manifest.replace('"format": 1', '"format": 2'), "of format 2"),
        (lambda manifest: manifest[:-20], "cannot be read"),
        (lambda manifest: "[]", "cannot be read"),
        (_rename, "outside of the backup"),
        (lambda manifest: manifest.replace('"server.key"', '"gone.key"'), "missing or was altered"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    kept: Kept, change: Callable[[str], str], problem: str
) -> None:
    path = kept.backup / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(BackupError, match=problem):
        restore(kept.new, kept.backup)
    assert not kept.new.data.exists()


def test_no_name_of_a_manifest_leads_out_of_the_new_folder(kept: Kept) -> None:
    """Also not one that leads to a file of the backup, as long as it is read from there."""
    root, backup = kept.backup.parent, kept.backup
    (backup / "linked").symlink_to("server.key")
    (backup / "linked-folder").symlink_to(".")
    (root / "outside.key").write_bytes((backup / "server.key").read_bytes())
    before = {path for path in root.iterdir() if path != backup}
    path = backup / MANIFEST
    sound = path.read_text()
    for name in (
        f"../{backup.name}/server.key",
        f"../{backup.name}/tenants/../../outside.key",
        f"{root}/{backup.name}/server.key",
        "tenants/../server.key",
        "./server.key",
        "linked",
        "linked-folder/server.key",
    ):
        path.write_text(sound.replace('"server.key"', json.dumps(name)))
        with pytest.raises(BackupError, match="outside of the backup"):
            restore(kept.new, backup)
        assert not kept.new.data.exists()
        assert {path for path in root.iterdir() if path != backup} == before


def test_nothing_is_restored_that_no_backup_holds(kept: Kept) -> None:
    """Keys, models and locks are not a backup's to bring along."""
    path = kept.backup / MANIFEST
    sound = path.read_text()
    for name in ("root.key", "models/weights.bin", "servers/x", "memsvc.lock"):
        planted = kept.backup / name
        planted.parent.mkdir(exist_ok=True)
        planted.write_bytes(b"planted")
        manifest = json.loads(sound)
        digest = hashlib.sha256(b"planted").hexdigest()
        manifest["files"][name] = {"bytes": 7, "sha256": digest}
        path.write_text(json.dumps(manifest))
        with pytest.raises(BackupError, match="which no backup holds"):
            restore(kept.new, kept.backup)
        assert not kept.new.data.exists()


def test_a_backup_may_be_reached_by_a_link(kept: Kept) -> None:
    link = kept.backup.with_name("newest")
    link.symlink_to(kept.backup)
    assert restore(kept.new, link).damage == ()


def test_an_altered_file_is_refused(kept: Kept) -> None:
    (data,) = kept.backup.glob("tenants/*/data.mdb")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(BackupError, match=r"data.mdb is missing or was altered"):
        restore(kept.new, kept.backup)
    with pytest.raises(BackupError, match="is no backup"):
        restore(kept.new, kept.backup / "tenants")


def test_what_is_damaged_is_copied_and_said(kept: Kept) -> None:
    async def uids() -> tuple[str, MemoryUid]:
        catalog = await Catalog.open(kept.config.catalog_url)
        tenant = await catalog.get_tenant("default")
        memory = await catalog.get_memory(tenant.uid, "teas")
        await catalog.close()
        return tenant.uid, MemoryUid(bytes.fromhex(memory.uid))

    tenant, memory = asyncio.run(uids())
    store = open_store(kept.config.folder, tenant)
    store.delete_documents(memory, [3])
    store.close()
    outcome = back_up(kept.config, kept.backup.with_name("damaged"))
    (damage,) = outcome.damage
    assert "document-missing" in damage
    target = kept.backup.with_name("by-command")
    done = run_cli("backup", target, "--data-dir", kept.config.data)
    assert done.returncode == 13
    assert "document-missing" in done.stderr.decode()
    assert (target / MANIFEST).exists()


def test_every_file_name_of_a_backup_is_known(kept: Kept) -> None:
    listed = json.loads((kept.backup / MANIFEST).read_text())["files"]
    kinds = {name.split("/")[0] for name in listed}
    assert kinds == {"catalog.db", "server.key", "keys", "receipts", "tenants"}


def _config(path: Path) -> Config:
    return load_config({"data": path})


def test_a_backup_of_an_empty_folder(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialise(_config(Path(folder) / "data"))
        outcome = back_up(_config(Path(folder) / "data"), tmp_path / "backup")
    assert outcome.damage == ()
