"""Readers, sinks, pacing, statuses and the link's limits, each alone."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from memsvc.v1.errors_pb2 import ErrorReason
from model_adapter import errors, wire
from model_adapter.engine import (
    DocumentTooLongError,
    EncodeFailure,
    EngineError,
    ModelMismatchError,
    QuestionTooLongError,
)
from model_adapter.pacing import EncodePacer, EncodeShare
from model_adapter.readers import Readers
from model_adapter.sinks import LoopSink
from model_adapter.status import status_of
from storage.layout import KVLayout
from storage.store import BlockReader, StoreNotFoundError
from tests.support.blocks import LAYOUTS, SEPARATE, make_block


class Handle:
    """Knows whether it was closed, and that it is closed once."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.open = True

    def close(self) -> None:
        assert self.open
        self.open = False


class Opener:
    """Opens handles; never two of a tenant at once."""

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.lock = threading.Lock()

    def __call__(self, tenant: str) -> BlockReader:
        if tenant == "none":
            raise StoreNotFoundError(tenant)
        with self.lock:
            assert tenant not in self.opened()
            self.handles.append(Handle(tenant))
            return cast(BlockReader, self.handles[-1])

    def opened(self) -> list[str]:
        return [handle.tenant for handle in self.handles if handle.open]


def test_handles_are_kept_up_to_a_number() -> None:
    opener = Opener()
    readers = Readers(opener, max_open=2)
    for tenant in "abac":
        with readers.use(tenant) as reader:
            assert cast(Handle, reader).tenant == tenant
    assert opener.opened() == ["a", "c"], "b was used longest ago"
    with readers.use("a"), readers.use("b"), readers.use("c"):
        assert sorted(opener.opened()) == ["a", "b", "c"], "handles in use stay"
    assert len(opener.opened()) == 2
    readers.close()
    assert opener.opened() == []


def test_a_store_that_is_not_there_is_looked_for_again() -> None:
    readers = Readers(Opener())
    for _ in range(2):
        with readers.use("none") as reader:
            assert reader is None


def test_a_closed_tenant_is_closed_by_its_last_user() -> None:
    opener = Opener()
    readers = Readers(opener)
    with readers.use("a"):
        readers.close_tenant("a")
        assert opener.opened() == ["a"]
        with readers.use("a"):  # Used again, so it stays.
            pass
    assert opener.opened() == ["a"]
    readers.close_tenant("a")
    readers.close_tenant("unknown")
    assert opener.opened() == []


def test_handles_under_many_threads() -> None:
    opener = Opener()
    readers = Readers(opener, max_open=2)

    def use(turn: int) -> None:
        with readers.use("abcd"[turn % 4]) as reader:
            assert cast(Handle, reader).open
            if turn % 7 == 0:
                readers.close_tenant("abcd"[turn % 3])
            assert cast(Handle, reader).open

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(400)))
    assert len(opener.opened()) <= 2


async def test_a_sink_passes_items_then_its_end() -> None:
    sink: LoopSink[str] = LoopSink(asyncio.get_running_loop())
    with ThreadPoolExecutor(1) as thread:
        for item in "abc":
            await asyncio.wrap_future(thread.submit(sink.put, item))
        await asyncio.wrap_future(thread.submit(sink.end, errors.DrainingError("over")))
    seen = []
    with pytest.raises(errors.DrainingError):
        async for item in sink.items():
            seen.append(item)
    assert seen == ["a", "b", "c"]


async def test_a_sink_is_ready_within_its_window() -> None:
    room: list[bool] = []
    sink: LoopSink[str] = LoopSink(
        asyncio.get_running_loop(), len, window=4, on_room=lambda: room.append(True)
    )
    for item in ("ab", "cd", "e"):
        assert sink.ready()
        sink.put(item)
    assert not sink.ready()
    items = sink.items()
    assert await anext(items) == "ab"
    assert not room, "what the caller holds still counts"
    assert await anext(items) == "cd"
    assert sink.ready()
    assert room == [True]


def test_a_sink_of_a_closed_loop_takes_anything() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    sink: LoopSink[str] = LoopSink(loop)
    sink.put("late")
    sink.end(None)


@given(
    st.floats(0.05, 0.95),
    st.lists(st.tuples(st.booleans(), st.floats(0.001, 3.0)), max_size=60),
)
def test_encoding_keeps_to_its_share(share: float, turns: list[tuple[bool, float]]) -> None:
    """While queries run, after any batch they get their part before the next."""
    pacer = EncodePacer(EncodeShare(busy_share=share))
    encoding = stepping = longest = 0.0
    for encode, seconds in turns:
        if encode and pacer.due(busy=True):
            pacer.encoded(1000, seconds)
            encoding += seconds
            longest = max(longest, seconds)
        else:
            pacer.stepped(seconds)
            stepping += seconds
        assert pacer.due(busy=False)
    assert (encoding - longest) * (1 - share) <= stepping * share + 1e-6


def test_batches_follow_the_measured_speed() -> None:
    pacer = EncodePacer(EncodeShare(batch_s=1, busy_batch_s=0.1, largest_batch_bytes=10**6))
    for _ in range(50):
        pacer.encoded(50_000, 0.5)
    assert pacer.batch_bytes(quiet_s=5) == pytest.approx(100_000, rel=0.01)
    assert pacer.batch_bytes(quiet_s=0) == pytest.approx(10_000, rel=0.01)
    pacer.encoded(10, 5.0)  # Too little to tell anything.
    assert pacer.batch_bytes(quiet_s=5) == pytest.approx(100_000, rel=0.01)
    for _ in range(50):
        pacer.encoded(1000, 1000.0)
    assert pacer.batch_bytes(quiet_s=0) == 256
    for _ in range(80):
        pacer.encoded(10**9, 0.0)
    assert pacer.batch_bytes(quiet_s=5) == 10**6


def every_error(root: type[EngineError] = EngineError) -> list[type[EngineError]]:
    """The tree, root first."""
    return [root, *(kind for sub in root.__subclasses__() for kind in every_error(sub))]


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_reason_and_a_code(kind: type[EngineError]) -> None:
    assert ErrorReason.Value(kind.reason) > 0
    status = status_of(kind("text", number="3"))
    assert status.code != grpc.StatusCode.OK.value[0]
    if kind.reason != "INTERNAL_FAULT":
        assert status.code != grpc.StatusCode.INTERNAL.value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == (
        "model_adapter",
        kind.reason,
        {"number": "3"},
    )


@pytest.mark.parametrize(
    ("kind", "code", "retried"),
    [
        (errors.OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        (errors.DrainingError, grpc.StatusCode.UNAVAILABLE, True),
        (errors.MemoryChangedError, grpc.StatusCode.UNAVAILABLE, True),
        (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, True),
        (errors.CorruptRecordError, grpc.StatusCode.DATA_LOSS, False),
        (ModelMismatchError, grpc.StatusCode.FAILED_PRECONDITION, False),
        (QuestionTooLongError, grpc.StatusCode.INVALID_ARGUMENT, False),
    ],
)
def test_codes(kind: type[EngineError], code: grpc.StatusCode, retried: bool) -> None:
    status = status_of(kind("text"))
    assert status.code == code.value[0]
    assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details) == retried


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [10_000, 100_000])
def test_the_longest_block_fits_a_message(layout: KVLayout, limit: int) -> None:
    tokens = wire.longest_document(layout, limit)
    assert tokens % layout.pool_tokens == 0
    block = make_block(layout, 2**62, tokens)
    assert wire.encode_response(block, layout).ByteSize() <= limit
    assert layout.block_bytes(tokens + 1) > limit - 5000


def test_blocks_and_failures_on_the_wire() -> None:
    block = make_block(SEPARATE, 3, 70)
    reply = wire.encode_response(block, SEPARATE)
    assert (reply.number, reply.block.tokens, reply.block.chunks) == (3, 70, 2)
    assert np.frombuffer(reply.block.value, np.uint16).tolist() == block.value_LCE.ravel().tolist()
    error = DocumentTooLongError("too long", limit="5", actual="6")
    failure = wire.encode_response(EncodeFailure(4, error), SEPARATE)
    assert (failure.number, failure.failure.reason) == (4, "DOCUMENT_TOO_LONG")
    assert failure.failure.metadata == {"limit": "5", "actual": "6"}
