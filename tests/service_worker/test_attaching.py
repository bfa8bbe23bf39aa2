"""Two models of different layouts side by side: attach, catch up, switch, detach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from storage.catalog import MemoryRow
from storage.store import EncodingId, MemoryUid
from tests.support.answers import Asking, asking, eventually, worker_apart
from tests.support.served import Folder, refused
from tests.support.tiny_adapters import tiny_adapter
from tests.support.tiny_checkpoints import write_gguf

OLD, NEW = "models/fake", "models/fake-new"
#: Another pooling size: other blocks, another identity.
NEW_SPEC = "fake:name=new,pool_tokens=4,encode_ms=15"
#: Small batches, so that there is a middle to look at.
SETTINGS = {"encode_batch_documents": 4}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def two_models(folder: Folder, root: Path) -> AsyncIterator[Asking]:
    """A server whose default is OLD and that has a worker of NEW as well. root: its folder."""
    data = root / "data"
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(worker_apart(data, root / "a"))
        new = await stack.enter_async_context(worker_apart(data, root / "b", NEW_SPEC))
        addresses = f"{old.address},{new.address}"
        served = await stack.enter_async_context(
            asking(folder, data, worker_address=addresses, **SETTINGS)
        )
        await eventually(lambda: _both(served))
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Asking]:
    """One for all tests but those that restart it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        async with two_models(folder, tmp_path_factory.mktemp("attaching")) as running:
            yield running


async def _both(served: Asking) -> bool:
    return served.app.workers.find("fake") is not None and (
        served.app.workers.find("fake-new") is not None
    )


async def attach(served: Asking, memory: str, **fields: Any) -> resources.Memory:
    request = pb.AttachModelRequest(**{"memory": memory, "model": NEW, **fields})
    found: resources.Memory = await served.as_operator(served.memories.AttachModel, request)
    return found


async def detach(served: Asking, memory: str, model: str) -> resources.Memory:
    request = pb.DetachModelRequest(memory=memory, model=model)
    found: resources.Memory = await served.as_operator(served.memories.DetachModel, request)
    return found


async def switched(served: Asking, memory: str) -> resources.Memory | None:
    found = await served.get(memory)
    return found if found.default_model == NEW else None


async def blocks_of(served: Asking, memory: MemoryRow, model: str) -> list[int]:
    row = await served.app.catalog.get_model(model.removeprefix("models/"))
    encoding, uid = (
        EncodingId(bytes.fromhex(row.identity)[:16]),
        MemoryUid(bytes.fromhex(memory.uid)),
    )
    return await served.app.stores.read(
        memory.tenant_uid, lambda store: store.block_numbers(uid, encoding)
    )


async def filled(served: Asking, documents: int = 12) -> str:
    memory = await served.create()
    await served.append(memory.name, *(f"boiler number {n}" for n in range(1, documents + 1)))
    await served.ready(memory.name)
    return memory.name


# --- the whole way ------------------------------------------------------------------


async def test_attach_switch_detach(served: Asking) -> None:
    memory = await filled(served)
    row = await served.row(memory)
    first = await served.get(memory)
    assert [e.model for e in first.encodings] == [OLD]
    assert (first.default_model, first.next_model) == (OLD, "")
    attached = await attach(served, memory, make_default=True)
    assert (attached.default_model, attached.next_model) == (OLD, NEW)
    assert attached.etag != first.etag
    after = await eventually(lambda: switched(served, memory))
    assert after.next_model == ""
    assert {e.model: e.complete for e in after.encodings} == {OLD: True, NEW: True}
    assert await blocks_of(served, row, NEW) == await blocks_of(served, row, OLD)
    answer = await served.ask(memory, "boiler number 7")
    assert answer.done is not None and answer.done.model == NEW and answer.cited == [7]
    # Both are kept up, and either may be named.
    await served.append(memory, "boiler number 13")
    for model in (OLD, NEW):
        answer = await served.ask(memory, "boiler number 13", model=model)
        assert answer.done is not None and answer.done.model == model
        assert answer.cited == [13]
    await detach(served, memory, OLD)
    assert await blocks_of(served, row, OLD) == []
    assert [e.model for e in (await served.get(memory)).encodings] == [NEW]
    assert await served.problems(await served.row(memory)) == []
    found = await refused(served.stream(memory, "boiler?", model=OLD))
    assert (found.code, found.reason) == ("FAILED_PRECONDITION", "MODEL_NOT_ATTACHED")
    assert found.metadata["model"] == "fake" and found.field == "model"


async def test_the_old_answers_until_the_new_is_complete(served: Asking) -> None:
    """Questions and appends go on all the while; none fails, none goes back after the switch."""
    memory = await filled(served, 40)
    await attach(served, memory, make_default=True)
    models: list[str] = []
    count = 40
    while models[-3:] != [NEW] * 3:
        answer = await served.ask(memory, f"boiler number {1 + len(models) % count}")
        assert answer.done is not None and len(answer.cited) == 1
        models.append(answer.done.model)
        if len(models) % 3 == 0:
            count += 1
            await served.append(memory, f"boiler number {count}")
            answer = await served.ask(memory, f"boiler number {count}")
            assert answer.cited == [count], "a question sees what was appended before it"
    assert models[0] == OLD
    assert models == sorted(models), "no answer from the old one after the switch"
    assert served.app.config.reencode_share == 0.25


async def test_one_that_is_not_ready_says_how_far_it_is(served: Asking) -> None:
    memory = await filled(served, 30)
    await attach(served, memory)

    async def begun() -> bool:
        (_, new) = (await served.get(memory)).encodings
        return new.encoded_documents > 0

    await eventually(begun)
    began = time.monotonic()
    found = await refused(served.stream(memory, "boiler?", model=NEW))
    assert time.monotonic() - began < 5, "it may take long, so the caller is told at once"
    assert (found.code, found.reason) == ("DEADLINE_EXCEEDED", "ENCODING_NOT_READY")
    assert found.retry_s is not None
    assert found.metadata["model"] == "fake-new" and found.metadata["documents"] == "30"
    assert 0 < int(found.metadata["encoded_documents"]) < 30
    assert (await served.ask(memory, "boiler number 3")).cited == [3]


async def test_progress_is_watched(served: Asking) -> None:
    memory = await filled(served, 20)
    watch = served.as_operator(served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory))
    await watch.read()
    await attach(served, memory, make_default=True)
    seen: list[int] = []
    while True:
        state = await watch.read()
        (new,) = [e for e in state.encodings if e.model == NEW]
        seen.append(new.encoded_documents)
        if state.default_model == NEW:
            assert (state.next_model, new.complete) == ("", True)
            break
        assert (state.default_model, state.next_model, new.complete) == (OLD, NEW, False)
    watch.cancel()
    assert seen == sorted(seen) and len(set(seen)) > 2 and seen[-1] == 20


async def test_a_restart_goes_on_where_it_was(folder: Folder, tmp_path: Path) -> None:
    """Tokens that were encoded once are not encoded again."""
    async with two_models(folder, tmp_path) as served:
        memory = await filled(served, 40)
        row = await served.row(memory)
        # Usage is counted a moment after the watermark moved.
        await eventually(lambda: _counted(served, row, 40 * 4))
        await attach(served, memory, make_default=True)
        await eventually(lambda: _held(served, row, 12))
        held = len(await blocks_of(served, row, NEW))
    (tmp_path / "a").rmdir()
    (tmp_path / "b").rmdir()
    async with two_models(folder, tmp_path) as served:
        await eventually(lambda: switched(served, memory))
        after = (await served.app.catalog.usage(row.tenant_uid)).encoded_tokens
        # A block whose batch was cut off is found again, and not counted at all.
        assert (40 - held) * 4 <= after - 40 * 4 <= 40 * 4
        assert await blocks_of(served, row, NEW) == list(range(1, 41))


async def _counted(served: Asking, row: MemoryRow, tokens: int) -> bool:
    return (await served.app.catalog.usage(row.tenant_uid)).encoded_tokens >= tokens


async def _held(served: Asking, row: MemoryRow, count: int) -> bool:
    return len(await blocks_of(served, row, NEW)) >= count


async def test_detaching_in_the_middle_leaves_nothing(served: Asking) -> None:
    memory = await filled(served, 60)
    row = await served.row(memory)
    for _ in range(4):
        await attach(served, memory, make_default=True)
        await eventually(lambda: _held(served, row, 5))
        left = await detach(served, memory, NEW)
        assert (left.default_model, left.next_model) == (OLD, "")
        assert await blocks_of(served, row, NEW) == []
    await asyncio.sleep(0.2)
    assert await blocks_of(served, row, NEW) == []
    await attach(served, memory, make_default=True)
    await eventually(lambda: switched(served, memory))
    assert await served.problems(row) == []
    assert await blocks_of(served, row, NEW) == list(range(1, 61))


# --- refusals and defaults ----------------------------------------------------------


async def test_what_is_refused(served: Asking) -> None:
    memory = await filled(served, 2)
    found = await refused(attach(served, memory, model="models/none"))
    assert (found.code, found.reason, found.field) == ("NOT_FOUND", "MODEL_NOT_FOUND", "model")
    found = await refused(attach(served, memory, model="fake-new"))
    assert (found.reason, found.field) == ("FIELD_INVALID", "model")
    found = await refused(attach(served, "memories/none"))
    assert (found.reason, found.field) == ("MEMORY_NOT_FOUND", "memory")
    found = await refused(detach(served, memory, OLD))
    assert (found.code, found.reason) == ("FAILED_PRECONDITION", "MODEL_IN_USE")
    assert (await detach(served, memory, NEW)).default_model == OLD, "not attached: no error"


async def test_a_tenants_default_is_followed(served: Asking) -> None:
    follows, keeps = await filled(served, 6), await filled(served, 6)
    await attach(served, keeps, model=OLD, make_default=True)
    request = admin.UpdateTenantRequest(
        tenant=admin.Tenant(name="tenants/default", default_model=NEW)
    )
    tenant = await served.as_operator(served.admin.UpdateTenant, request)
    assert tenant.default_model == NEW
    await eventually(lambda: switched(served, follows))
    assert (await served.get(keeps)).default_model == OLD
    assert (await served.create()).default_model == NEW
    request.tenant.default_model = "models/none"
    found = await refused(served.as_operator(served.admin.UpdateTenant, request))
    assert (found.reason, found.field) == ("MODEL_NOT_FOUND", "tenant.default_model")
    request.tenant.default_model = ""
    request.update_mask.paths.append("default_model")
    await served.as_operator(served.admin.UpdateTenant, request)
    assert (await served.create()).default_model == OLD


async def test_where_the_old_worker_is_gone_the_new_model_is_waited_for(
    folder: Folder, tmp_path: Path
) -> None:
    """A server that is started with another model: its memories follow, and questions wait."""
    async with asking(folder, tmp_path / "data") as served:
        memory = await filled(served, 10)
    async with asking(folder, tmp_path / "data", worker_model=NEW_SPEC) as served:
        answer = await served.ask(memory, "boiler number 9")
        assert answer.done is not None and answer.done.model == NEW and answer.cited == [9]
        assert (await served.get(memory)).default_model == NEW


async def test_an_adapter_on_the_same_base_moves_what_was_encoded_without_it(
    folder: Folder, tmp_path: Path
) -> None:
    """What a release that ships an adapter for its default model does to memories made before."""
    base, adapter = tmp_path / "Tiny.gguf", tmp_path / "adapter.safetensors"
    write_gguf(base)
    tiny_adapter(adapter, base, name="Tiny")  # called like its base, as an adapter may be
    model, data = str(base), tmp_path / "data"
    async with asking(folder, data, worker_model=model, worker_adapter="none") as served:
        memory = await filled(served, 3)
        assert (await served.get(memory)).default_model == "models/tiny"
    async with asking(folder, data, worker_model=model, worker_adapter=str(adapter)) as served:
        answer = await served.ask(memory, "boiler number 2")
        assert answer.done is not None and answer.done.model == "models/tiny-with-memory"
        assert sorted(await served.blocks(await served.row(memory))) == [1, 2, 3]
        assert (await detach(served, memory, "models/tiny")).default_model == answer.done.model
