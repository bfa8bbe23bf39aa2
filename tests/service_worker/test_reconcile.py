"""Every state that a crash can leave, made by hand, then a start of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from memsvc.application import Application
from memsvc.check import CheckFinding, Severity, check_data
from memsvc.config import Config
from memsvc.reconcile import Report, reconcile
from storage.catalog import Catalog, DocumentRow, MemoryRow, MemoryState, ModelRow
from storage.documents import TextSource
from storage.layout import KVLayout
from storage.store import EncodingId, MemoryUid, StoreDamagedError, StoredDocument
from tests.support.bad_disk import damage
from tests.support.blocks import make_block
from tests.support.keys import keys_in, open_store
from tests.support.served import Folder, serve

LAYOUT = KVLayout((1, 3), 2, 8, 4, "bf16", separate_routing_keys=True)
IDENTITY = "cd" * 32
ENCODING = EncodingId(bytes.fromhex(IDENTITY)[:16])
FOREIGN = EncodingId(b"f" * 16)


class Crashed:
    """A data folder that no server holds: catalog and store, to be brought out of step."""

    def __init__(self, config: Config, catalog: Catalog, tenant_uid: str) -> None:
        self.catalog = catalog
        self.tenant_uid = tenant_uid
        self.store = open_store(config.folder, tenant_uid)
        self.model = ModelRow("known", "", IDENTITY, LAYOUT, 100, 100, 100, True, 1)

    async def memory(self, memory_id: str, documents: int) -> MemoryRow:
        """A sound memory: every document with text and block, watermark at its end."""
        await self.catalog.upsert_model(self.model)
        row = await self._new(memory_id, MemoryState.ACTIVE)
        if not documents:
            return row
        row = await self.write(row, documents)
        numbers = range(1, documents + 1)
        self.put_blocks(row, ENCODING, *numbers)
        await self.catalog.commit_encoded(
            row.uid, "known", IDENTITY, documents, documents, documents, documents, {}
        )
        return row

    async def write(self, row: MemoryRow, documents: int) -> MemoryRow:
        """An append that was acknowledged."""
        numbers = range(row.last_number + 1, row.last_number + 1 + documents)
        self.put_texts(row, *numbers)
        rows = [DocumentRow(number, row.revision + 1, 1, 4) for number in numbers]
        return await self.catalog.commit_append(row.uid, row.revision, rows, None)

    async def _new(self, memory_id: str, state: MemoryState) -> MemoryRow:
        from memsvc.packing import policy
        from storage.catalog import PackingMode

        return await self.catalog.create_memory(
            self.tenant_uid, memory_id, "", {}, policy(PackingMode.TURN), state, None
        )

    async def importing(self, memory_id: str) -> MemoryRow:
        """A memory that an import had begun to fill."""
        return await self.write(await self._new(memory_id, MemoryState.IMPORTING), 3)

    def put_texts(self, row: MemoryRow, *numbers: int) -> None:
        """Texts alone."""
        self.store.put_documents(
            _uid(row), [StoredDocument(n, 1, 1, TextSource(f"text {n}")) for n in numbers]
        )

    def put_blocks(self, row: MemoryRow, encoding: EncodingId, *numbers: int) -> None:
        """Blocks alone."""
        blocks = [make_block(LAYOUT, number, 5) for number in numbers]
        self.store.put_blocks(_uid(row), encoding, LAYOUT, blocks)


def _uid(row: MemoryRow) -> MemoryUid:
    return MemoryUid(bytes.fromhex(row.uid))


class Bench:
    """Makes a crash state, then opens the server's parts on it."""

    def __init__(self, folder: Folder, target: Path) -> None:
        self.config = folder.copy(target)
        self.credential = folder.credential

    @asynccontextmanager
    async def crashed(self) -> AsyncIterator[Crashed]:
        """The folder while no server runs."""
        catalog = await Catalog.open(self.config.catalog_url)
        tenant = await catalog.get_tenant("default")
        crashed = Crashed(self.config, catalog, tenant.uid)
        try:
            yield crashed
        finally:
            crashed.store.close()
            await catalog.close()

    @asynccontextmanager
    async def restarted(self) -> AsyncIterator[tuple[Application, Report]]:
        """A server after its start. The report is of a second run: its start was the first."""
        async with serve(self.config, self.credential) as served:
            application = served.server.application
            yield application, await reconcile(application)


@pytest.fixture
def bench(folder: Folder, tmp_path: Path) -> Bench:
    return Bench(folder, tmp_path / "data")


async def _findings(bench: Bench) -> list[CheckFinding]:
    """Of `memsvc check`."""
    return [finding async for finding in check_data(bench.config)]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """What reconcile reported at each start."""
    import memsvc.server

    found: list[Report] = []

    async def spy(application: Application) -> Report:
        found.append(await reconcile(application))
        return found[-1]

    monkeypatch.setattr(memsvc.server, "reconcile", spy)
    return found


async def test_a_sound_folder_is_left_alone(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("sound", 5)
        await crashed.memory("empty", 0)
    async with bench.restarted() as (app, again):
        assert reports[0].clean and again.clean
        assert (await app.catalog.get_memory_by_uid(row.uid)).revision == 1
        numbers = await app.stores.read(
            row.tenant_uid, lambda store: store.block_numbers(_uid(row), ENCODING)
        )
        assert numbers == [1, 2, 3, 4, 5]


async def test_an_append_that_was_not_acknowledged_is_undone(
    bench: Bench, reports: list[Report]
) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("half", 3)
        crashed.put_texts(row, 4, 5)
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(orphan_documents=2) and again.clean
        assert await _texts(app, row) == [1, 2, 3]


async def test_a_deletion_of_documents_is_finished(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("cut", 5)
        await crashed.catalog.commit_delete_documents(row.uid, row.revision, [2, 4], None)
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(removed_documents=2) and again.clean
        assert await _texts(app, row) == [1, 3, 5]
        assert await _blocks(app, row) == [1, 3, 5]
        assert await app.catalog.removed_numbers(row.uid) == []


async def test_a_deletion_of_a_memory_is_finished(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        kept, row = await crashed.memory("kept", 2), await crashed.memory("gone", 5)
        await crashed.catalog.begin_delete_memory(row.tenant_uid, "gone", None)
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(memories_deleted=1) and again.clean
        held = await app.stores.read(row.tenant_uid, lambda store: store.memories())
        assert held == [_uid(kept)]
        assert await app.catalog.memories_in_state(MemoryState.DELETING) == []


async def test_an_import_is_undone(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.importing("coming")
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(imports_undone=1) and again.clean
        assert await app.stores.read(row.tenant_uid, lambda store: store.memories()) == []
        assert await app.catalog.memories_in_state(MemoryState.IMPORTING) == []


async def test_a_memory_that_the_catalog_lost_is_removed(
    bench: Bench, reports: list[Report]
) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("gone", 3)
        await crashed.catalog.begin_delete_memory(row.tenant_uid, "gone", None)
        await crashed.catalog.finish_delete_memory(row.uid)
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(orphan_memories=1) and again.clean
        assert await app.stores.read(row.tenant_uid, lambda store: store.memories()) == []


@pytest.mark.parametrize("documents", [0, 2])
@pytest.mark.parametrize("unmade", [False, True])
async def test_a_fork_that_the_catalog_never_had_is_removed(
    bench: Bench, reports: list[Report], documents: int, unmade: bool
) -> None:
    """unmade: what removed it was cut short behind its key."""
    fork = MemoryUid(b"\x77" * 16)
    async with bench.crashed() as crashed:
        row = await crashed.memory("parent", documents)
        crashed.store.fork(_uid(row), fork, documents)
    if unmade:
        keys_in(bench.config.folder, row.tenant_uid).destroy(fork)
    (finding,) = await _findings(bench)
    assert (finding.severity, finding.memory) == (Severity.LEFTOVER, fork.hex())
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(orphan_memories=1) and again.clean
        held = await app.stores.read(row.tenant_uid, lambda store: store.memories())
        assert fork not in held
        assert await _texts(app, row) == list(range(1, documents + 1))
    assert await _findings(bench) == []


async def test_a_watermark_over_missing_blocks_is_put_back(
    bench: Bench, reports: list[Report]
) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("gap", 6)
        crashed.store.delete_blocks(_uid(row), ENCODING, [3, 5])
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(rewound_encodings=1) and again.clean
        (encoding,) = await app.catalog.list_encodings(row.uid)
        assert (encoding.encoded_number, encoding.pending_documents) == (2, 4)


async def test_a_document_set_aside_is_no_gap(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("aside", 2)
        row = await crashed.write(row, 1)
        aside = {3: "DOCUMENT_TOO_LONG"}
        await crashed.catalog.commit_encoded(row.uid, "known", IDENTITY, 3, 0, 0, 0, aside)
    async with bench.restarted() as (_, again):
        assert reports[0].clean and again.clean


async def test_blocks_of_replaced_weights_are_removed(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("old", 3)
        crashed.put_blocks(row, FOREIGN, 1, 2, 3)
    async with bench.restarted() as (app, again):
        assert reports[0] == Report(foreign_encodings=1) and again.clean
        held = await app.stores.read(row.tenant_uid, lambda store: store.encodings(_uid(row)))
        assert held == [ENCODING]


async def test_a_block_without_its_document_is_removed(bench: Bench, reports: list[Report]) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("extra", 3)
        crashed.put_blocks(row, ENCODING, 9)
    async with bench.restarted() as (app, again):
        assert again.clean
        assert await _blocks(app, row) == [1, 2, 3]


async def test_a_lost_text_is_reported_and_nothing_else_touched(
    bench: Bench, reports: list[Report]
) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("lossy", 3)
        crashed.store.delete_documents(_uid(row), [2])
    async with bench.restarted() as (app, again):
        assert reports[0].lost_documents == {row.uid: [2]}
        assert again.lost_documents == {row.uid: [2]}
        assert await _texts(app, row) == [1, 3]


async def test_a_damaged_store_stops_its_tenant_and_no_other(
    bench: Bench, reports: list[Report]
) -> None:
    async with bench.crashed() as crashed:
        row = await crashed.memory("damaged", 3)
        await crashed.catalog.commit_delete_documents(row.uid, row.revision, [2], None)
        leaving = await crashed.memory("leaving", 2)
        await crashed.catalog.begin_delete_memory(leaving.tenant_uid, "leaving", None)
        other = await crashed.catalog.create_tenant("other", "")
    data = bench.config.folder.tenant(row.tenant_uid) / "data.mdb"
    content = damage(data.parent)
    async with bench.restarted() as (app, again):
        assert reports[0].damaged_stores == again.damaged_stores == [row.tenant_uid]
        with pytest.raises(StoreDamagedError):
            await _texts(app, row)
        assert row.uid in app.deletions.owed, "who asks is told what not to look at"
        assert await app.stores.run(other.uid, lambda store: store.memories()) == []
    assert data.read_bytes() == content
    assert {finding.problem for finding in await _findings(bench)} == {"damaged"}


async def test_staging_files_are_gone(bench: Bench) -> None:
    staged = bench.config.folder.staging / "left.msamem"
    async with bench.crashed() as crashed:
        await crashed.memory("any", 1)
    staged.parent.mkdir(exist_ok=True)
    staged.write_bytes(b"left by a crash")
    async with bench.restarted():
        assert not staged.exists()


async def test_all_at_once_and_twice(bench: Bench, reports: list[Report]) -> None:
    """Every state together: one start mends them all, a second finds nothing."""
    async with bench.crashed() as crashed:
        half = await crashed.memory("half", 3)
        crashed.put_texts(half, 4)
        cut = await crashed.memory("cut", 5)
        await crashed.catalog.commit_delete_documents(cut.uid, cut.revision, [1], None)
        gap = await crashed.memory("gap", 4)
        crashed.store.delete_blocks(_uid(gap), ENCODING, [1])
        crashed.put_blocks(gap, FOREIGN, 2)
        gone = await crashed.memory("gone", 2)
        await crashed.catalog.begin_delete_memory(gone.tenant_uid, "gone", None)
        await crashed.importing("coming")
    expected = Report(
        memories_deleted=1,
        imports_undone=1,
        orphan_documents=1,
        removed_documents=1,
        foreign_encodings=1,
        rewound_encodings=1,
    )
    async with bench.restarted():
        assert reports[0] == expected
    async with bench.restarted():
        assert reports[1].clean


async def _texts(app: Application, row: MemoryRow) -> list[int]:
    return await app.stores.read(row.tenant_uid, lambda store: store.document_numbers(_uid(row)))


async def _blocks(app: Application, row: MemoryRow) -> list[int]:
    return await app.stores.read(
        row.tenant_uid, lambda store: store.block_numbers(_uid(row), ENCODING)
    )


def test_the_report_says_whether_anything_was_done() -> None:
    assert Report().clean
    assert not Report(orphan_documents=1).clean
