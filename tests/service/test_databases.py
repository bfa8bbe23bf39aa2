"""The same story on both databases; and PostgreSQL going away under the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from memsvc.config import Config, load_config
from memsvc.server import initialise
from memsvc.v1 import memory_service_pb2 as pb
from storage.catalog import CatalogUnavailableError, MemoryRow, documents
from storage.catalog.revisions import record_revision
from tests.service.test_successors import exported, import_as
from tests.support.postgres import PostgresForTests, run_postgres
from tests.support.served import NO_WORKER, Folder, Served, refusal, refused, serve, turns


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    """This module's own server, as one of its tests stops it."""
    yield from run_postgres()


@pytest.fixture
def postgres_config(postgres: PostgresForTests, tmp_path: Path) -> Iterator[tuple[Config, str]]:
    name = postgres.make_database()
    config = load_config(
        {
            "data": tmp_path / "data",
            "listen": "127.0.0.1:0",
            "worker_address": NO_WORKER,
            "database_url": postgres.url(name),
        }
    )
    credential = initialise(config).credential
    assert credential is not None
    yield config, credential
    postgres.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def prepared(request: pytest.FixtureRequest, folder: Folder, tmp_path: Path) -> tuple[Config, str]:
    if request.param == "sqlite":
        return folder.copy(tmp_path / "data"), folder.credential
    found: tuple[Config, str] = request.getfixturevalue("postgres_config")
    return found


@pytest.fixture
async def running(prepared: tuple[Config, str]) -> AsyncIterator[Served]:
    async with serve(*prepared) as served:
        yield served


async def test_appends_of_many_writers(running: Served) -> None:
    names = [(await running.create(f"memory-{index}")).name for index in range(3)]
    # Every call is made twice, as by a client that retries too early.
    calls = [
        running.append(name, f"{name} {index}", request_id=f"{name[-1]}-{index}")
        for name in names
        for index in range(8)
        for _ in range(2)
    ]
    replies = await asyncio.gather(*calls)
    assert all(first == second for first, second in zip(replies[::2], replies[1::2], strict=True))
    for name in names:
        mine = [reply for reply in replies[::2] if reply.documents[0].startswith(f"{name}/")]
        assert sorted(reply.revision for reply in mine) == list(range(1, 9))
        assert sorted(await running.texts(name)) == [f"{name} {index}" for index in range(8)]


async def test_one_name_and_one_request_id_under_contention(running: Served) -> None:
    same = pb.CreateMemoryRequest(memory_id="contended", request_id="c-1")
    others = [pb.CreateMemoryRequest(memory_id="contended") for _ in range(4)]
    outcomes = await asyncio.gather(
        *(
            running.as_operator(running.memories.CreateMemory, request)
            for request in [same, *others, same]
        ),
        return_exceptions=True,
    )
    made = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len({memory.uid for memory in made}) == 1


@pytest.mark.parametrize(
    ("call", "calls", "room"), [("create", 8, 3), ("import", 2, 1), ("fork", 8, 3)]
)
async def test_memories_made_at_once_stay_within_the_quota(
    prepared: tuple[Config, str], call: str, calls: int, room: int
) -> None:
    config, credential = prepared
    most = room + 1
    async with serve(replace(config, max_memories_per_tenant=most), credential) as served:
        await served.append((await served.create("source")).name, "one")
        data = await exported(served, "memories/source")

        def make(number: int) -> Any:
            if call == "fork":
                return served.fork("memories/source", f"memory-{number}")
            if call == "import":
                return import_as(served, data, f"memory-{number}")
            return served.create(f"memory-{number}")

        outcomes = await asyncio.gather(*map(make, range(calls)), return_exceptions=True)
        refusals = [refusal(one) for one in outcomes if isinstance(one, aio.AioRpcError)]
        assert len(refusals) == calls - room
        expected = {"quota": "max_memories_per_tenant", "limit": str(most)}
        assert all(one.metadata == expected for one in refusals)
        listed = await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
        assert len(listed.memories) == most
        catalog, keys = served.server.application.catalog, served.server.application.keys
        of_tenant = keys.tenant((await catalog.get_tenant("default")).uid)
        assert of_tenant is not None
        known = {bytes.fromhex(memory.uid) for memory in listed.memories}
        assert set(of_tenant.memories()) <= known, "no key of one that was refused"


async def test_deleting_and_restarting(prepared: tuple[Config, str]) -> None:
    async with serve(*prepared) as served:
        memory = await served.create("mortal")
        reply = await served.append(memory.name, "a", "b", "c")
        await served.as_operator(
            served.memories.DeleteDocuments,
            pb.DeleteDocumentsRequest(parent=memory.name, names=[reply.documents[1]]),
        )
    async with serve(*prepared) as served:
        assert await served.texts(memory.name) == ["a", "c"]
        await served.as_operator(
            served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name)
        )
        assert (await refused(served.append(memory.name, "d"))).reason == "MEMORY_NOT_FOUND"


async def test_a_database_that_goes_away_and_comes_back(
    postgres: PostgresForTests, postgres_config: tuple[Config, str]
) -> None:
    async with serve(*postgres_config) as served:
        memory = await served.create("patient")
        await served.append(memory.name, "before")
        await asyncio.to_thread(postgres.stop)
        try:
            request = pb.AppendTurnsRequest(
                memory=memory.name, turns=turns("during"), request_id="r-1"
            )
            for _ in range(2):
                answer = await refused(served.as_operator(served.memories.AppendTurns, request))
                assert (answer.reason, answer.code) == ("CATALOG_UNAVAILABLE", "UNAVAILABLE")
                assert answer.retry_s
        finally:
            await asyncio.to_thread(postgres.start)
        reply = await served.as_operator(served.memories.AppendTurns, request)
        assert reply.revision == 2
        assert await served.texts(memory.name) == ["before", "during"]


@pytest.mark.parametrize("second", ["precious", "other"])
async def test_a_commit_that_lands_after_its_connection_broke_keeps_its_text(
    postgres_config: tuple[Config, str], monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    """The server loses its connection while PostgreSQL commits an append; the same append, or
    another, comes before the commit has landed."""
    began, land = asyncio.Event(), asyncio.Event()
    landing: list[asyncio.Task[object]] = []

    async def record(*args: Any, **kwargs: Any) -> None:
        await record_revision(*args, **kwargs)
        if not began.is_set():
            began.set()
            await land.wait()

    async with serve(*postgres_config) as served:
        memory = await served.create("patient")
        await served.append(memory.name, "first")
        catalog = served.server.application.catalog
        really_commit = catalog.commit_append

        async def lost(*args: Any, **kwargs: Any) -> MemoryRow:
            monkeypatch.setattr(catalog, "commit_append", really_commit)
            landing.append(asyncio.create_task(really_commit(*args, **kwargs)))
            await began.wait()
            raise CatalogUnavailableError("the connection broke")

        monkeypatch.setattr(documents, "record_revision", record)
        monkeypatch.setattr(catalog, "commit_append", lost)
        call = served.append(memory.name, "precious", request_id="r-1")
        assert (await refused(call)).reason == "CATALOG_UNAVAILABLE"
        request_id = "r-1" if second == "precious" else ""
        again = asyncio.ensure_future(served.append(memory.name, second, request_id=request_id))
        await asyncio.sleep(0.3)
        land.set()
        await asyncio.gather(*landing, again)
        reply = await served.append(memory.name, "precious", request_id="r-1")
        assert reply.revision == 2
        assert await served.texts(memory.name) == list(dict.fromkeys(["first", "precious", second]))
