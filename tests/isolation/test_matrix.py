"""Isolation: what is somebody else's answers exactly as what never was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2, descriptor_pool

from memsvc.v1 import memory_service_pb2 as pb
from tests.isolation import matrix as matrix_module
from tests.isolation.fields import Kind, leaves
from tests.isolation.matrix import Matrix, uncovered
from tests.isolation.world import METHODS, World, make_world
from tests.support.served import make_folder, turns

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    root = tmp_path_factory.mktemp("isolation")
    folder = await asyncio.to_thread(make_folder, Path(root) / "template")
    async with make_world(folder, Path(root) / "data") as made:
        yield made


async def test_every_rpc_and_every_field_has_a_case() -> None:
    assert uncovered() == []


async def test_a_new_rpc_and_a_new_field_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="new.proto", package="new")
    message = file.message_type.add(name="NewRequest")
    message.field.add(name="secret_name", number=1, type=9, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)

    class NewMethod:
        name = "NewCall"
        input_type = pool.FindMessageTypeByName("new.NewRequest")

    monkeypatch.setattr(matrix_module, "METHODS", {**METHODS, "NewCall": NewMethod})
    assert uncovered() == [
        "NewCall: no request in BASES",
        "NewCall.secret_name: no kind in fields.py",
    ]


@pytest.mark.parametrize("method", sorted(METHODS))
async def test_what_is_theirs_answers_as_what_never_was(world: World, method: str) -> None:
    before = await world.belongings()
    matrix = Matrix(world)
    await matrix.run(method)
    assert matrix.report.failures == []
    named = {leaf.kind for leaf in leaves(METHODS[method].input_type)}
    if named - {Kind.MODEL, Kind.PLAIN}:
        assert matrix.report.calls > 0
    after = await world.belongings()
    added = [row for row in after["memories"] if row not in before["memories"]]
    # What the victim itself made for the attacks comes on top; nothing else changed.
    assert all(row.memory_id.startswith(("own-", "kept-", "m-")) for (row,) in added)
    for kind, rows in before.items():
        assert [row for row in rows if row not in after[kind]] == []


async def test_memories_of_one_name_are_apart(world: World) -> None:
    served, attacker, victim = world.served, world.attacker, world.victim
    watch = attacker.admin(served.memories.WatchMemory, pb.WatchMemoryRequest(name="memories/twin"))
    events = aiter(watch)
    assert (await anext(events)).revision == 1
    append = pb.AppendTurnsRequest(memory="memories/twin", turns=turns("Zanzibar again"))
    await victim.admin(served.memories.AppendTurns, append)
    listed = await attacker.admin(
        served.memories.ListDocuments, pb.ListDocumentsRequest(parent="memories/twin")
    )
    assert len(listed.documents) == 2
    append.turns[0].text = "own again"
    await attacker.admin(served.memories.AppendTurns, append)
    # The victim's append was no event here: the next one is the attacker's own.
    state = await anext(events)
    assert state.revision == 2
    found = await attacker.admin(
        served.memories.GetDocument, pb.GetDocumentRequest(name="memories/twin/documents/3")
    )
    assert found.conversation.turns[0].text == "own again"
    watch.cancel()


async def test_a_difference_would_be_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tenancy broken in one handler, its cases fail."""
    catalog = world.served.server.application.catalog
    victim = await catalog.get_tenant("victim")
    honest = catalog.show_memory

    async def leaky(tenant_uid: str, memory_id: str, **named: object) -> object:
        return await honest(victim.uid, memory_id, **named)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(catalog, "show_memory", leaky)
    matrix = Matrix(world)
    await matrix.run("GetMemory")
    assert any("shows what is the victim's" in failure for failure in matrix.report.failures)
