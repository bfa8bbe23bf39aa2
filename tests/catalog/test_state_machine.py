"""Random writes, deletions and encoding against a model of a memory in plain Python."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from storage.catalog import (
    Catalog,
    ConflictError,
    EncodingState,
    MemoryState,
    NotFoundError,
    RequestIdReusedError,
    RequestRecord,
    RequestRepeatedError,
)
from tests.support.catalogs import PACKING, new_documents, request_record

Result = TypeVar("Result")

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=6)


class MemoryMachine(RuleBasedStateMachine):
    """One memory under one model. Live documents are a dict of number to size."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.live: dict[int, int] = {}
        self.added: dict[int, int] = {}
        self.removed: set[int] = set()
        self.revision = self.last = self.epoch = self.watermark = 0
        self.quarantined: set[int] = set()
        self.failed = False
        self.requests: list[RequestRecord] = []

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(call)

    @initialize()
    def make(self) -> None:
        self.catalog = self.run(Catalog.open(self.url))
        self.model = self.name = secrets.token_hex(8)
        tenant = self.run(self.catalog.create_tenant(self.name, ""))
        self.tenant_uid = tenant.uid
        created = self.catalog.create_memory(
            tenant.uid, "memory", "", {}, PACKING, MemoryState.ACTIVE, None
        )
        self.uid = self.run(created).uid
        self.run(self.catalog.ensure_encoding(self.uid, self.model, "identity"))

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            self.run(self.catalog.close())
        self.runner.close()

    def pending(self) -> list[int]:
        return sorted(number for number in self.live if number > self.watermark)

    def next_request(self) -> RequestRecord:
        count = str(len(self.requests))
        self.requests.append(request_record(count, payload=count, reply=count.encode()))
        return self.requests[-1]

    @rule(sizes=SIZES, gap=st.integers(0, 3))
    def append(self, sizes: list[int], gap: int) -> None:
        memory = self.run(self.catalog.get_memory_by_uid(self.uid))
        documents = [
            type(new)(new.number + gap, new.revision_added, new.created_us, new.text_bytes)
            for new in new_documents(memory, sizes)
        ]
        self.run(
            self.catalog.commit_append(self.uid, self.revision, documents, self.next_request())
        )
        self.revision += 1
        self.last = documents[-1].number
        for document in documents:
            self.live[document.number] = document.text_bytes
            self.added[document.number] = self.revision

    @precondition(lambda self: self.live)
    @rule(data=st.data(), with_request=st.booleans())
    def delete(self, data: st.DataObject, with_request: bool) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.live)), min_size=1, max_size=5))
        request = self.next_request() if with_request else None
        self.run(self.catalog.commit_delete_documents(self.uid, self.revision, chosen, request))
        if any(number > self.watermark for number in chosen):
            self.failed = False
        self.take_away(chosen)
        self.revision += 1
        self.epoch += 1

    def take_away(self, chosen: Iterable[int]) -> None:
        for number in chosen:
            del self.live[number]
            self.removed.add(number)
            self.quarantined.discard(number)

    @rule(data=st.data())
    def delete_something_that_is_not_there(self, data: st.DataObject) -> None:
        wrong = data.draw(st.sampled_from([self.last + 1, *sorted(self.removed)]))
        some = [*sorted(self.live)[:2], wrong]
        with pytest.raises(NotFoundError) as caught:
            self.run(self.catalog.commit_delete_documents(self.uid, self.revision, some, None))
        assert caught.value.numbers == (wrong,)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), changed=st.booleans())
    def repeat(self, data: st.DataObject, changed: bool) -> None:
        first = data.draw(st.sampled_from(self.requests))
        again = request_record(first.request_id, payload="other" if changed else first.request_id)
        memory = self.run(self.catalog.get_memory_by_uid(self.uid))
        with pytest.raises(RequestIdReusedError if changed else RequestRepeatedError) as caught:
            documents = new_documents(memory, [1])
            self.run(self.catalog.commit_append(self.uid, self.revision, documents, again))
        if isinstance(caught.value, RequestRepeatedError):
            assert caught.value.record == first

    @precondition(lambda self: self.pending())
    @rule(data=st.data(), limit=st.integers(1, 8))
    def encode(self, data: st.DataObject, limit: int) -> None:
        batch = self.run(self.catalog.next_numbers(self.uid, self.model, limit))
        assert batch == self.pending()[:limit]
        aside = data.draw(st.sets(st.sampled_from(batch), max_size=2))
        reasons = dict.fromkeys(aside, "too long")
        done = len(batch) - len(aside)
        self.run(
            self.catalog.commit_encoded(
                self.uid, self.model, "identity", batch[-1], done, 7 * done, 90 * done, reasons
            )
        )
        self.watermark = batch[-1]
        self.quarantined |= aside
        self.failed = False

    @precondition(lambda self: self.watermark)
    @rule()
    def encode_what_is_encoded(self) -> None:
        with pytest.raises(ConflictError):
            self.run(
                self.catalog.commit_encoded(
                    self.uid, self.model, "identity", self.watermark, 1, 1, 1, {}
                )
            )

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        below = data.draw(st.integers(1, self.last + 1))
        self.run(self.catalog.rewind_encoding(self.uid, self.model, below))
        self.epoch += 1
        self.watermark = min(self.watermark, below - 1)
        self.quarantined = {number for number in self.quarantined if number < below}
        self.failed = False

    @rule()
    def fail(self) -> None:
        self.run(self.catalog.fail_encoding(self.uid, self.model, "worker refuses"))
        self.failed = self.failed or bool(self.pending())

    @rule()
    def resume(self) -> None:
        self.run(self.catalog.resume_encodings(self.model))
        self.failed = False

    @precondition(lambda self: self.removed)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.removed)), min_size=1))
        self.run(self.catalog.forget_removed(self.uid, gone))
        self.removed -= gone

    @rule()
    def reopen(self) -> None:
        self.run(self.catalog.close())
        self.catalog = self.run(Catalog.open(self.url))

    @invariant()
    def memory_is_as_modelled(self) -> None:
        assume(hasattr(self, "uid"))
        memory = self.run(self.catalog.get_memory_by_uid(self.uid))
        assert (memory.revision, memory.last_number) == (self.revision, self.last)
        assert memory.deletion_epoch == self.epoch
        assert memory.document_count == len(self.live)
        assert memory.text_bytes == sum(self.live.values())
        page, end = self.run(self.catalog.list_documents(self.uid, 1000))
        assert {row.number: row.text_bytes for row in page} == self.live
        assert {row.number: row.revision_added for row in page}.items() <= self.added.items()
        assert end is None
        assert set(self.run(self.catalog.removed_numbers(self.uid))) == self.removed

    @invariant()
    def encoding_is_as_modelled(self) -> None:
        assume(hasattr(self, "uid"))
        row = self.run(self.catalog.get_encoding(self.uid, self.model))
        assert row is not None
        pending = self.pending()
        assert (row.encoded_number, row.pending_documents) == (self.watermark, len(pending))
        assert row.quarantined_documents == len(self.quarantined)
        assert set(self.run(self.catalog.quarantined(self.uid, self.model))) == self.quarantined
        encoded = len(self.live) - len(pending) - len(self.quarantined)
        assert row.encoded_documents == encoded
        assert encoded > 0 or (row.tokens, row.bytes) == (0, 0)
        waiting_bytes = sum(self.live[number] for number in pending)
        waiting = list(self.run(self.catalog.pending_by_tenant(self.model)).values())
        assert waiting == ([(len(pending), waiting_bytes)] if pending else [])
        assert row.encoded_revision == (self.added[pending[0]] - 1 if pending else self.revision)
        if not pending:
            assert row.state is EncodingState.READY
        else:
            assert row.state is (EncodingState.FAILED if self.failed else EncodingState.ENCODING)
        queued = [one.uid for _, one, _ in self.run(self.catalog.backlog(self.model, 10))]
        assert queued == ([self.uid] if pending and not self.failed else [])


def test_against_the_model(catalog_url: str) -> None:
    machine = type("Machine", (MemoryMachine,), {"url": catalog_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
