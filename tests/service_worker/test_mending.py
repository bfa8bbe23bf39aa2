"""Damage put into a store by hand, then `memsvc reconcile`, then a server that encodes again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from memsvc.check import Severity, check_data
from memsvc.mending import Mended, mend
from memsvc.reconcile import reconcile
from memsvc.server import open_application
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from storage.keys import Kind, block_key, document_key, encoding_key
from storage.store import EncodingId, MemoryUid
from tests.support.answers import Asking, asking
from tests.support.live import run_cli
from tests.support.served import Folder, refused

Change = Callable[[lmdb.Transaction], object]


class Damaged:
    """A memory of six encoded documents, to be damaged while no server runs."""

    def __init__(self, folder: Folder, data: Path) -> None:
        self.folder = folder
        self.config = folder.copy(data)
        self.uid = MemoryUid(b"")
        self.encoding = EncodingId(b"")
        self.tenant = ""

    async def fill(self) -> None:
        async with self.serving() as served:
            memory = await served.create("mend")
            await served.append(memory.name, *(f"fact {n}" for n in range(1, 7)))
            await served.ready(memory.name)
            row = await served.row(memory.name)
            (encoding,) = await served.app.catalog.list_encodings(row.uid)
        self.uid, self.tenant = MemoryUid(bytes.fromhex(row.uid)), row.tenant_uid
        self.encoding = EncodingId(bytes.fromhex(encoding.identity)[:16])

    def serving(self) -> AbstractAsyncContextManager[Asking]:
        return asking(self.folder, self.config.data)

    def change(self, change: Change) -> None:
        environment = lmdb.open(str(self.config.folder.tenant(self.tenant)), map_size=2**28)
        with environment.begin(write=True) as transaction:
            change(transaction)
        environment.close()

    def block(self, kind: Kind, number: int) -> bytes:
        return block_key(self.uid, kind, self.encoding, number)

    async def mend(self) -> Mended:
        async with open_application(self.config) as application:
            await reconcile(application)
            return await mend(application)

    async def damage(self) -> set[str]:
        """What check finds."""
        return {
            finding.problem
            async for finding in check_data(self.config)
            if finding.severity is Severity.DAMAGE
        }


@pytest.fixture
async def damaged(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Damaged:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Damaged(folder, tmp_path / "data")
    await made.fill()
    return made


def flip(transaction: lmdb.Transaction, key: bytes) -> None:
    value = bytearray(transaction.get(key, b""))
    value[-1] ^= 1
    transaction.put(key, bytes(value))


async def test_damaged_blocks_are_made_again(damaged: Damaged) -> None:
    def change(transaction: lmdb.Transaction) -> None:
        flip(transaction, damaged.block(Kind.ROUTING, 2))
        flip(transaction, damaged.block(Kind.CONTENT, 3))
        transaction.delete(damaged.block(Kind.CONTENT, 5))

    damaged.change(change)
    assert await damaged.damage() == {"damaged", "half-block"}
    assert await damaged.mend() == Mended(blocks=3)
    assert await damaged.mend() == Mended()
    async with damaged.serving() as served:
        encoding = await served.ready("memories/mend")
        assert (encoding.encoded_documents, encoding.quarantined_documents) == (6, 0)
        assert await served.problems(await served.row("memories/mend")) == []
        assert (await served.ask("memories/mend", "fact 3")).done is not None
    assert await damaged.damage() == set()


async def test_a_damaged_layout_costs_the_encoding_and_no_text(damaged: Damaged) -> None:
    damaged.change(lambda t: flip(t, encoding_key(damaged.uid, damaged.encoding)))
    assert await damaged.mend() == Mended(blocks=6)
    async with damaged.serving() as served:
        assert (await served.ready("memories/mend")).encoded_documents == 6
    assert await damaged.damage() == set()


async def test_a_damaged_text_is_reported_and_set_aside(damaged: Damaged) -> None:
    damaged.change(lambda t: flip(t, document_key(damaged.uid, 4)))
    mended = await damaged.mend()
    assert mended == Mended(blocks=1, damaged_texts={damaged.uid.hex(): [4]})
    assert mended.lost
    async with damaged.serving() as served:
        encoding = await served.ready("memories/mend")
        assert (encoding.encoded_documents, encoding.quarantined_documents) == (5, 1)
        answer = await served.ask("memories/mend", "fact 4")
        assert answer.usage is not None and answer.usage.routed_documents == 5
        assert 4 not in answer.cited
        refusal = await refused(read(served, 4))
        assert (refusal.code, refusal.reason) == ("DATA_LOSS", "RECORD_CORRUPT")
        # Whoever has the text appends it again, and deletes what is damaged.
        await served.delete_documents("memories/mend", 4)
    assert await damaged.damage() == set()


def read(served: Asking, number: int) -> object:
    request = pb.GetDocumentRequest(name=f"memories/mend/documents/{number}", view=resources.FULL)
    return served.as_operator(served.memories.GetDocument, request)


async def test_the_command(damaged: Damaged) -> None:
    damaged.change(lambda t: flip(t, damaged.block(Kind.CONTENT, 3)))
    command = ("reconcile", "--data-dir", damaged.config.data)
    done = await asyncio.to_thread(run_cli, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == "1 blocks are to be encoded again."
    damaged.change(lambda t: flip(t, document_key(damaged.uid, 4)))
    done = await asyncio.to_thread(run_cli, *command)
    assert done.returncode == 13
    assert f"damaged texts of memory {damaged.uid.hex()}: [4]" in done.stdout.decode()


def test_nothing_found_is_nothing_lost() -> None:
    assert not Mended(blocks=2).lost
    assert replace(Mended(), unmended=["x"]).lost
