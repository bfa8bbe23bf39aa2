"""Random lives of memories and their forks over a socket, beside an oracle in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from memsvc.reconcile import reconcile
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.support.answers import Asking

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORDS = ("heron", "otter", "badger", "linnet", "marten", "plover", "curlew", "dunlin")
STEPS, MOST = 30, 5


@dataclass
class Model:
    """What a memory should hold: texts by number, and the last number of each revision."""

    texts: dict[int, str] = field(default_factory=dict)
    first: int = 0
    last: dict[int, int] = field(default_factory=lambda: {0: 0})
    held: dict[int, int] = field(default_factory=lambda: {0: 0})

    @property
    def revision(self) -> int:
        return max(self.last)

    def write(self, last: int, *, added: int = 0, removed: int = 0) -> None:
        """One more revision."""
        held = self.held[self.revision] + added - removed
        self.last[self.revision + 1] = last
        self.held[self.revision] = held

    def at(self, revision: int) -> dict[int, str]:
        """What is left of what it held then."""
        return {n: text for n, text in self.texts.items() if n <= self.last[revision]}


class Program:
    def __init__(self, served: Asking, seed: int) -> None:
        self.served, self.random = served, random.Random(seed)
        self.models: dict[str, Model] = {}

    def one(self) -> tuple[str, Model]:
        return self.random.choice(sorted(self.models.items()))

    async def step(self) -> None:
        kinds = ["append"] * 4 + ["delete", "fork", "fork", "restore", "drop"]
        kind = self.random.choice(kinds) if self.models else "create"
        await getattr(self, kind)()

    async def create(self) -> None:
        self.models[(await self.served.create()).name] = Model()

    async def append(self) -> None:
        name, model = self.one()
        texts = [" ".join(self.random.sample(WORDS, 3)) for _ in range(self.random.randint(1, 3))]
        await self.served.append(name, *texts)
        last = model.last[model.revision]
        model.texts |= {last + 1 + i: text for i, text in enumerate(texts)}
        model.write(last + len(texts), added=len(texts))

    async def delete(self) -> None:
        name, model = self.one()
        if model.texts:
            count = min(len(model.texts), self.random.randint(1, 3))
            gone = self.random.sample(sorted(model.texts), count)
            await self.served.delete_documents(name, *gone)
            for number in gone:
                del model.texts[number]
            model.write(model.last[model.revision], removed=len(gone))

    async def fork(self) -> None:
        name, model = self.one()
        past = self.random.randint(max(1, model.first), max(1, model.revision))
        revision = self.random.choice([model.revision, past])
        if len(self.models) >= MOST or revision > model.revision:
            return
        reply = await self.served.fork(name, at_revision=revision)
        texts = model.at(revision)
        assert reply.documents_missing == model.held[revision] - len(texts)
        last = {revision: model.last[revision]}
        self.models[reply.memory.name] = Model(texts, revision, last, {revision: len(texts)})

    async def restore(self) -> None:
        name, model = self.one()
        revision = self.random.randint(max(1, model.first), max(1, model.revision))
        if revision > model.revision:
            return
        reply = await self.served.restore(name, revision)
        kept = model.at(revision)
        assert reply.documents_removed == len(model.texts) - len(kept)
        assert reply.documents_missing == model.held[revision] - len(kept)
        removed = reply.documents_removed
        model.texts = kept
        model.write(model.last[model.revision], removed=removed)

    async def drop(self) -> None:
        name, _ = self.one()
        del self.models[name]
        await self.served.delete(name)

    async def judge(self) -> None:
        """Every memory holds and finds what it should, now and as of one earlier revision."""
        for name, model in self.models.items():
            assert await self.served.texts(name) == [model.texts[n] for n in sorted(model.texts)]
            then = self.random.randint(max(1, model.first), max(1, model.revision))
            for revision in {model.revision, then}:
                if revision in model.last and revision:
                    assert await self.found(name, revision) == set(model.at(revision))

    async def found(self, name: str, revision: int) -> set[int]:
        request = pb.RetrieveRequest(
            memory=name,
            question=" ".join(WORDS),
            limit=100,
            view=resources.BASIC,
            at_revision=revision,
        )
        reply: Any = await self.served.as_operator(self.served.memories.Retrieve, request)
        return {document.number for document in reply.documents}


@pytest.mark.parametrize("seed", range(2))
async def test_any_life(shared: Asking, seed: int) -> None:
    program = Program(shared, seed)
    for _ in range(STEPS):
        await program.step()
        if program.random.random() < 0.2:
            await program.judge()
    await program.judge()
    for name in program.models:
        await shared.ready(name)
        assert await shared.problems(await shared.row(name)) == []
    # A start would have nothing to do.
    assert (await reconcile(shared.app)).clean
    for name in list(program.models):
        await shared.delete(name)
