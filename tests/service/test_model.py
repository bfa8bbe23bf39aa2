"""Random writes, faults and restarts against a dictionary that says what must be there."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc import aio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from memsvc.v1 import memory_service_pb2 as pb
from storage.catalog import CatalogUnavailableError
from tests.support.served import Folder, Served, refusal, refused, serve

MEMORIES = ("one-memory", "two-memory")

#: What, to which memory, and how many documents or which of them.
Step = tuple[str, str, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "append",
                "append",
                "append",
                "repeat",
                "delete documents",
                "delete",
                "fault",
                "restart",
            ]
        ),
        st.sampled_from(MEMORIES),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=25,
)


@dataclass
class Expected:
    """One memory as it must be: text by number."""

    texts: dict[int, str] = field(default_factory=dict)
    last_number: int = 0
    revision: int = 0


@dataclass(frozen=True)
class Answered:
    """An append that was acknowledged. memory: the one that it was to."""

    name: str
    memory: Expected
    texts: Sequence[str]
    request_id: str
    reply: pb.AppendTurnsResponse


class Run:
    """The server, the oracle, and what was acknowledged."""

    def __init__(self, folder: Folder, data: Path) -> None:
        self._folder, self._data = folder, data
        self._stack = AsyncExitStack()
        self._served: Served | None = None
        self._requests = itertools.count()
        self._answered: list[Answered] = []
        self.expected: dict[str, Expected] = {}

    @property
    def served(self) -> Served:
        assert self._served is not None
        return self._served

    async def restart(self, *_: object) -> None:
        await self._stack.aclose()
        config = self._folder.copy(self._data)
        self._served = await self._stack.enter_async_context(serve(config, self._folder.credential))

    async def close(self) -> None:
        await self._stack.aclose()

    async def memory(self, name: str) -> Expected:
        if name not in self.expected:
            await self.served.create(name)
            self.expected[name] = Expected()
        return self.expected[name]

    async def append(self, name: str, count: int) -> None:
        expected = await self.memory(name)
        request_id = f"r-{next(self._requests)}"
        texts = [f"{request_id} {index}" for index in range(count)]
        reply = await self.served.append(f"memories/{name}", *texts, request_id=request_id)
        self.accept(expected, name, texts, reply)
        self._answered.append(Answered(name, expected, texts, request_id, reply))

    def accept(
        self, expected: Expected, name: str, texts: Sequence[str], reply: pb.AppendTurnsResponse
    ) -> None:
        numbers = range(expected.last_number + 1, expected.last_number + 1 + len(texts))
        assert list(reply.documents) == [f"memories/{name}/documents/{n}" for n in numbers]
        assert reply.revision == expected.revision + 1
        expected.texts.update(zip(numbers, texts, strict=True))
        expected.last_number, expected.revision = numbers[-1], reply.revision

    async def repeat(self, _: str, which: int) -> None:
        """A retry gets the first reply, whatever happened to the memory since; it is refused
        where another memory has the name by now."""
        if not self._answered:
            return
        first = self._answered[-min(which, len(self._answered))]
        parent, request_id = f"memories/{first.name}", first.request_id
        again = self.served.append(parent, *first.texts, request_id=request_id)
        if self.expected.get(first.name, first.memory) is first.memory:
            assert await again == first.reply
        else:
            assert (await refused(again)).reason == "REQUEST_ID_REUSED"

    async def fault(self, name: str, which: int) -> None:
        """SQL fails after LMDB, before or after committing; the retry settles it."""
        expected = await self.memory(name)
        catalog = self.served.server.application.catalog
        real = catalog.commit_append

        async def fail(*arguments: Any) -> Any:
            if which % 2:
                await real(*arguments)
            raise CatalogUnavailableError("injected")

        request_id = f"r-{next(self._requests)}"
        texts = [f"{request_id} {index}" for index in range(which)]
        catalog.commit_append = fail  # type: ignore[assignment, method-assign]  # the fault
        try:
            await self.served.append(f"memories/{name}", *texts, request_id=request_id)
        except aio.AioRpcError as error:
            assert refusal(error).retry_s
        finally:
            catalog.commit_append = real  # type: ignore[method-assign]  # mended
        reply = await self.served.append(f"memories/{name}", *texts, request_id=request_id)
        self.accept(expected, name, texts, reply)

    async def delete_documents(self, name: str, count: int) -> None:
        expected = await self.memory(name)
        numbers = list(expected.texts)[::2][:count]
        if not numbers:
            return
        request = pb.DeleteDocumentsRequest(
            parent=f"memories/{name}", names=[f"memories/{name}/documents/{n}" for n in numbers]
        )
        reply = await self.served.as_operator(self.served.memories.DeleteDocuments, request)
        expected.revision += 1
        assert reply.revision == expected.revision
        for number in numbers:
            del expected.texts[number]

    async def delete(self, name: str, _: int) -> None:
        request = pb.DeleteMemoryRequest(name=f"memories/{name}", allow_missing=True)
        await self.served.as_operator(self.served.memories.DeleteMemory, request)
        self.expected.pop(name, None)

    async def check(self) -> None:
        app = self.served.server.application
        tenant = (await app.catalog.get_tenant("default")).uid
        stored: dict[str, list[int]] = await app.stores.read(
            tenant, lambda s: {uid.hex(): s.document_numbers(uid) for uid in s.memories()}
        )
        known = set()
        for name, expected in self.expected.items():
            got = await self.served.as_operator(
                self.served.memories.GetMemory, pb.GetMemoryRequest(name=f"memories/{name}")
            )
            known.add(got.uid)
            assert (got.revision, got.document_count) == (expected.revision, len(expected.texts))
            assert await self.served.texts(f"memories/{name}") == list(expected.texts.values())
            assert stored.get(got.uid, []) == list(expected.texts)
        assert set(stored) <= known


#: Another memory of the name, and then an append to the first one again.
NAMED_AGAIN = [
    ("append", "one-memory", 1),
    ("delete", "one-memory", 1),
    ("append", "one-memory", 1),
    ("repeat", "one-memory", 2),
]


@given(steps)
@example(NAMED_AGAIN)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_service_does_what_the_dictionary_says(folder: Folder, plan: list[Step]) -> None:
    async def story(data: Path) -> None:
        run = Run(folder, data)
        await run.restart()
        try:
            for what, name, number in plan:
                await getattr(run, what.replace(" ", "_"))(name, number)
            await run.check()
            await run.restart()
            await run.check()
        finally:
            await run.close()

    with tempfile.TemporaryDirectory() as data:
        asyncio.run(story(Path(data) / "data"))
