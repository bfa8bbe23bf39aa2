"""Random forks, writes and deletions against a model in which every memory has its own copy."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from storage.catalog import Catalog, DocumentRow, MemoryState
from storage.catalog.base import new_uid
from storage.catalog.tables import documents, lineages, memories
from tests.support.catalogs import PACKING, model_row, new_documents

Result = TypeVar("Result")
MODEL = "fake"


@dataclass
class Held:
    """What a memory should show. removed: deleted, and not yet forgotten."""

    uid: str
    live: dict[int, DocumentRow]
    revision: int
    watermark: int
    removed: set[int] = field(default_factory=set)


class ForkMachine(RuleBasedStateMachine):
    """One tenant; memories by name, each with what it holds."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.held: dict[str, Held] = {}
        self.made = 0

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(call)

    @initialize()
    def make(self) -> None:
        self.catalog = self.run(Catalog.open(self.url))
        self.model = secrets.token_hex(8)
        tenant = self.run(self.catalog.create_tenant(self.model, ""))
        self.tenant_uid = tenant.uid
        self.run(self.catalog.upsert_model(model_row(self.model, default=False)))
        for _ in range(2):
            name = self.name()
            created = self.catalog.create_memory(
                tenant.uid, name, "", {}, PACKING, MemoryState.ACTIVE, None
            )
            uid = self.run(created).uid
            self.run(self.catalog.attach_model(uid, self.model))
            self.held[name] = Held(uid, {}, 0, 0)
            self.append_to(self.held[name], [3, 4, 5])

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            for name in list(self.held):
                self.drop(name)
            assert self.rows() == [[], [], []]
            self.run(self.catalog.close())
        self.runner.close()

    def rows(self) -> list[list[Any]]:
        """Of the tenant: memories, lineages, documents."""
        mine = select(memories.c.uid).where(memories.c.tenant_uid == self.tenant_uid)
        shared = select(lineages).where(lineages.c.memory_uid.in_(mine))
        held = select(documents).where(documents.c.memory_uid.in_(mine))

        async def read() -> list[list[Any]]:
            async with self.catalog._database.reading() as connection:
                return [list(await connection.execute(one)) for one in (mine, shared, held)]

        async def anywhere() -> list[list[Any]]:
            return await self.catalog._database.run(read(), writes=False)

        return self.run(anywhere())

    def name(self) -> str:
        self.made += 1
        return f"memory-{self.made}"

    def any_of(self, data: st.DataObject) -> Held:
        return self.held[data.draw(st.sampled_from(sorted(self.held)))]

    def append_to(self, held: Held, sizes: list[int]) -> None:
        memory = self.run(self.catalog.get_memory_by_uid(held.uid))
        added = new_documents(memory, sizes)
        self.run(self.catalog.commit_append(held.uid, held.revision, added, None))
        held.revision += 1
        held.live.update((document.number, document) for document in added)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4))
    def append(self, data: st.DataObject, sizes: list[int]) -> None:
        self.append_to(self.any_of(data), sizes)

    @precondition(lambda self: any(held.live for held in self.held.values()))
    @rule(data=st.data(), forget=st.booleans())
    def delete(self, data: st.DataObject, forget: bool) -> None:
        names = sorted(name for name, held in self.held.items() if held.live)
        held = self.held[data.draw(st.sampled_from(names))]
        chosen = data.draw(st.sets(st.sampled_from(sorted(held.live)), min_size=1, max_size=4))
        self.run(self.catalog.commit_delete_documents(held.uid, held.revision, chosen, None))
        held.revision += 1
        held.removed |= chosen
        for number in chosen:
            del held.live[number]
        if forget:
            self.forget_of(held, chosen)

    def forget_of(self, held: Held, chosen: set[int]) -> None:
        self.run(self.catalog.forget_removed(held.uid, [*chosen, *list(held.live)[:1], 999]))
        held.removed -= chosen

    @precondition(lambda self: any(held.removed for held in self.held.values()))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        held = self.held[
            data.draw(st.sampled_from(sorted(n for n, held in self.held.items() if held.removed)))
        ]
        self.forget_of(held, data.draw(st.sets(st.sampled_from(sorted(held.removed)), min_size=1)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), limit=st.integers(1, 5))
    def encode(self, data: st.DataObject, limit: int) -> None:
        held = self.any_of(data)
        batch = self.run(self.catalog.next_numbers(held.uid, self.model, limit))
        assert batch == sorted(n for n in held.live if n > held.watermark)[:limit]
        if batch:
            self.run(
                self.catalog.commit_encoded(
                    held.uid, self.model, "identity-1", batch[-1], len(batch), 1, 1, {}
                )
            )
            held.watermark = batch[-1]

    @precondition(lambda self: 0 < len(self.held) < 7)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        held = self.any_of(data)
        parent = self.run(self.catalog.get_memory_by_uid(held.uid))
        first = parent.forked_revision if parent.forked_from else 0
        at = data.draw(st.integers(first, held.revision))
        then = self.run(self.catalog.revision_at(held.uid, revision=at))
        name = self.name()
        child = replace(
            parent,
            uid=new_uid(),
            memory_id=name,
            revision=then.revision,
            last_number=then.last_number,
        )
        self.run(self.catalog.commit_fork(parent, child, None, lambda *_: None))
        live = {n: d for n, d in held.live.items() if n <= then.last_number}
        watermark = min(held.watermark, then.last_number)
        self.held[name] = Held(child.uid, live, then.revision, watermark)

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def delete_memory(self, data: st.DataObject) -> None:
        self.drop(data.draw(st.sampled_from(sorted(self.held))))

    def drop(self, name: str) -> None:
        self.run(self.catalog.begin_delete_memory(self.tenant_uid, name, None))
        held = self.held.pop(name)
        self.run(self.catalog.finish_delete_memory(held.uid))

    @invariant()
    def every_memory_shows_its_own(self) -> None:
        for held in self.held.values():
            numbers = sorted(held.live)
            page, _ = self.run(self.catalog.list_documents(held.uid, 1000))
            assert {row.number: row for row in page} == held.live
            assert [row.number for row in page] == numbers
            some, more = self.run(self.catalog.list_documents(held.uid, 2, 1, 6))
            inside = [number for number in numbers if 1 < number <= 6]
            assert ([row.number for row in some], more is not None) == (inside[:2], len(inside) > 2)
            assert self.run(self.catalog.get_documents(held.uid, range(1, 999))) == held.live
            assert self.run(self.catalog.live_numbers(held.uid, 2, 9)) == [
                number for number in numbers if 2 <= number <= 9
            ]
            assert set(self.run(self.catalog.removed_numbers(held.uid))) == held.removed
            memory = self.run(self.catalog.get_memory_by_uid(held.uid))
            assert memory.document_count == len(numbers)
            assert memory.text_bytes == sum(row.text_bytes for row in held.live.values())
            (own,) = self.run(self.catalog.list_encodings(held.uid))
            pending = [number for number in numbers if number > held.watermark]
            assert own.pending_documents == len(pending)
            waiting = held.live[pending[0]].revision_added - 1 if pending else held.revision
            assert own.encoded_revision == waiting

    @invariant()
    def no_row_is_left_that_nobody_needs(self) -> None:
        if not hasattr(self, "tenant_uid"):
            return
        _, lines, rows = self.rows()
        there = {(row.memory_uid, row.number) for row in rows}
        for uid, number in there:
            over = [line for line in lines if line.first_number <= number <= line.last_number]
            users = {uid, *(line.memory_uid for line in over if line.owner_uid == uid)}
            held = [held for held in self.held.values() if held.uid in users]
            needed = any(number in one.live or number in one.removed for one in held)
            hides = any(
                line.memory_uid == uid and (line.owner_uid, number) in there for line in over
            )
            assert needed or hides, (uid, number)


def test_against_the_model(catalog_url: str) -> None:
    machine = type("Machine", (ForkMachine,), {"url": catalog_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
