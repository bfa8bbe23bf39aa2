"""The parts that need no worker: news, plans, troubles, pressure, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode, aio
from hypothesis import given
from hypothesis import strategies as st

from memsvc.api_error import STATUS_DETAILS_KEY, ApiError
from memsvc.encoding.plan import MAX_STRIKES, Job, Plan, Troubles
from memsvc.encoding.pressure import Backlog, Bounds, Rate
from memsvc.encoding.share import Share
from memsvc.progress import Progress, TooManySubscribersError
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.workers.failures import WorkerFaultError, from_call_failure

# --- progress -----------------------------------------------------------------------


async def test_changes_while_nobody_waits_are_one_wake_up() -> None:
    progress = Progress()
    with progress.subscribe("a") as subscription:
        for _ in range(1000):
            progress.publish("a")
        progress.publish("b")
        await asyncio.wait_for(subscription.changed(), 1)
        assert not subscription.take()
        progress.publish("a")
        assert subscription.take() and not subscription.take()


async def test_a_waiter_is_woken() -> None:
    progress = Progress()
    with progress.subscribe("a") as one, progress.subscribe("a") as two:
        waiting = asyncio.gather(one.changed(), two.changed())
        await asyncio.sleep(0)
        progress.publish("a")
        await asyncio.wait_for(waiting, 1)


async def test_an_append_wakes_only_whom_it_may_bring_something() -> None:
    progress = Progress()
    with progress.subscribe("a") as watching, progress.subscribe("a", appends=False) as asking:
        progress.publish("a", appended=True)
        assert watching.take() and not asking.take()
        progress.publish("a")
        assert watching.take() and asking.take()


async def test_subscriptions_are_bounded_and_leave_nothing() -> None:
    progress = Progress(max_subscribers=2)
    with (
        progress.subscribe("a"),
        progress.subscribe("b"),
        pytest.raises(TooManySubscribersError),
        progress.subscribe("c"),
    ):
        pass
    assert progress.subscribers == 0
    assert progress._subscribers == {}
    with pytest.raises(KeyError), progress.subscribe("a"):
        raise KeyError
    assert progress.subscribers == 0


# --- plan ---------------------------------------------------------------------------


def _jobs(*tenants: str) -> list[Job]:
    return [Job(tenant, f"{tenant}{index}", 0, 10) for index, tenant in enumerate(tenants)]


def _turns(plan: Plan, count: int) -> list[str]:
    found = [plan.next() for _ in range(count)]
    return [job.memory_uid for job in found if job is not None]


def test_tenants_take_turns_and_so_do_their_memories() -> None:
    plan = Plan()
    plan.merge(_jobs("a", "a", "a", "b", "c"))
    expected = ["a0", "b3", "c4", "a1", "b3", "c4", "a2", "b3", "c4", "a0"]
    assert _turns(plan, 10) == expected


def test_a_tenant_with_one_memory_waits_no_longer_for_one_with_many() -> None:
    plan = Plan()
    plan.merge(_jobs(*["a"] * 60))
    _turns(plan, 7)
    plan.merge([Job("b", "b", 0, 10)])
    assert _turns(plan, 6).count("b") == 3


def test_a_job_in_flight_keeps_its_cursor_and_learns_of_more() -> None:
    plan = Plan()
    plan.merge([Job("a", "m", 0, 10)])
    job = plan.next()
    assert job is not None
    job.cursor, job.in_flight = 10, 1
    assert plan.next() is None
    plan.merge([Job("a", "m", 0, 15)])
    again = plan.next()
    assert again is job and (again.cursor, again.last_number) == (10, 15)


def test_a_broken_job_waits_for_its_batches_and_starts_over() -> None:
    plan = Plan()
    plan.merge([Job("a", "m", 0, 10)])
    job = plan.next()
    assert job is not None
    job.cursor, job.in_flight, job.broken = 8, 1, True
    plan.merge([Job("a", "m", 4, 10)])
    assert plan.next() is None
    job.in_flight = 0
    plan.merge([Job("a", "m", 4, 10)])
    fresh = plan.next()
    assert fresh is not None and fresh is not job and fresh.cursor == 4


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8)), max_size=30))
def test_every_job_is_planned_to_its_end(found: Sequence[tuple[str, int]]) -> None:
    plan = Plan()
    jobs = [Job(tenant, f"{tenant}{i}", 0, last) for i, (tenant, last) in enumerate(found)]
    plan.merge(jobs)
    while (job := plan.next()) is not None:
        job.cursor += 1
    assert all(job.cursor == job.last_number for job in jobs)


# --- troubles -----------------------------------------------------------------------


def test_batches_narrow_until_a_document_has_failed_alone_too_often() -> None:
    troubles, sizes, size = Troubles(), [], 64
    for _ in range(20):
        size = troubles.limit("m", 64)
        sizes.append(size)
        if troubles.failed("m", size, alone=bool(sizes[1:])):
            break
    assert sizes == [64, 16, 4, *[1] * MAX_STRIKES]


def test_a_success_clears_strikes_and_widens() -> None:
    troubles = Troubles()
    for _ in range(3):
        assert not troubles.failed("m", 1, alone=True)
    troubles.succeeded("m", 1, 64)
    assert troubles.limit("m", 64) == 4
    assert not troubles.failed("m", 1, alone=True)
    for size in (1, 4, 16):
        troubles.succeeded("m", size, 64)
    assert not troubles and troubles.limit("m", 64) == 64


def test_what_failed_in_company_is_not_blamed() -> None:
    troubles = Troubles()
    assert not any(troubles.failed("m", 1, alone=False) for _ in range(20))


def test_memories_that_no_longer_wait_are_forgotten() -> None:
    troubles = Troubles()
    troubles.failed("m", 8, alone=True)
    troubles.failed("n", 8, alone=True)
    troubles.forget_all_but(["n"])
    assert troubles.limit("m", 64) == 64 and troubles.limit("n", 64) == 2


# --- pressure -----------------------------------------------------------------------


def _waiting(documents: int, text_bytes: int) -> Backlog:
    backlog = Backlog()
    backlog.counted({"t": (documents, text_bytes)})
    return backlog


def test_the_bound_counts_what_waits_and_what_was_let_in() -> None:
    bounds, backlog, rate = Bounds(10, 1000), _waiting(5, 100), Rate()
    bounds.check(backlog, rate, "t", 5, 0)
    backlog.admit("t", 5, 0)
    for tenant in ("t", "another"):
        with pytest.raises(ApiError) as caught:
            bounds.check(backlog, rate, tenant, 1, 0)
        assert caught.value.reason == ErrorReason.ENCODING_BACKLOG_FULL
    backlog = _waiting(5, 990)
    with pytest.raises(ApiError):
        bounds.check(backlog, rate, "t", 1, 11)
    bounds.check(_waiting(5, 100), rate, "t", 5, 900)


def test_what_is_let_in_while_a_count_runs_is_not_lost() -> None:
    backlog = _waiting(3, 30)
    backlog.counting()
    backlog.admit("t", 2, 20)
    backlog.counted({"t": (3, 30)})  # read before the two were written
    assert (backlog.total.documents, backlog.of("t").text_bytes) == (5, 50)
    backlog.counting()
    backlog.counted({"t": (5, 50)})
    assert (backlog.total.documents, backlog.of("t").text_bytes) == (5, 50)


def test_one_tenant_cannot_fill_the_queue_for_others() -> None:
    bounds, backlog, rate = Bounds(1000, 10**9), Backlog(), Rate()
    with pytest.raises(ApiError):
        for _ in range(1001):
            bounds.check(backlog, rate, "flood", 1, 1)
            backlog.admit("flood", 1, 1)
    assert 790 <= backlog.of("flood").documents <= 810
    bounds.check(backlog, rate, "newcomer", 100, 100)
    backlog.admit("newcomer", 100, 100)
    with pytest.raises(ApiError):
        bounds.check(backlog, rate, "flood", 1, 1)
    bounds.check(backlog, rate, "newcomer", 50, 50)
    backlog.counted({"newcomer": (100, 100)})
    bounds.check(backlog, rate, "flood", 1, 1)


def test_what_could_never_fit_is_let_in_when_nothing_waits() -> None:
    Bounds(10, 1000).check(Backlog(), Rate(), "t", 50, 5000)


@given(st.integers(1, 10**6), st.integers(1, 10**9), st.floats(1, 1e9))
def test_the_hint_is_bounded(documents: int, text_bytes: int, rate: float) -> None:
    with pytest.raises(ApiError) as caught:
        Bounds(1, 1).check(_waiting(documents, text_bytes), Rate(rate), "t", 1, 1)
    assert caught.value.retry_after_s is not None and 1 <= caught.value.retry_after_s <= 60


def test_a_slower_model_asks_for_more_patience() -> None:
    hints = []
    for rate in (1e3, 1e5):
        with pytest.raises(ApiError) as caught:
            Bounds(10**6, 10**5).check(_waiting(10, 10**5), Rate(rate), "t", 1, 1)
        hints.append(caught.value.retry_after_s or 0)
    assert hints[0] > hints[1]


# --- failures of a worker -----------------------------------------------------------


def _failure(code: StatusCode, reason: str = "", **metadata: str) -> aio.AioRpcError:
    trailing = aio.Metadata()
    if reason:
        status = status_pb2.Status(code=code.value[0], message="why")
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.ErrorInfo(reason=reason, metadata=metadata))
        status.details.append(packed)
        trailing.add(STATUS_DETAILS_KEY, status.SerializeToString())
    return aio.AioRpcError(code, aio.Metadata(), trailing, "why")


@pytest.mark.parametrize(
    ("failure", "reason", "retried"),
    [
        (_failure(StatusCode.UNAVAILABLE), "WORKER_UNAVAILABLE", True),
        (_failure(StatusCode.CANCELLED), "WORKER_UNAVAILABLE", True),
        (_failure(StatusCode.DEADLINE_EXCEEDED), "WORKER_UNAVAILABLE", True),
        (_failure(StatusCode.UNAVAILABLE, "DRAINING"), "WORKER_UNAVAILABLE", True),
        (_failure(StatusCode.RESOURCE_EXHAUSTED), "OVERLOADED", True),
        (_failure(StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"), "OVERLOADED", True),
        (_failure(StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"), "MODEL_MISMATCH", False),
        (_failure(StatusCode.DATA_LOSS, "RECORD_CORRUPT", number="3"), "RECORD_CORRUPT", False),
        (_failure(StatusCode.INVALID_ARGUMENT, "QUESTION_TOO_LONG"), "QUESTION_TOO_LONG", False),
    ],
)
def test_failures_are_typed(failure: aio.AioRpcError, reason: str, retried: bool) -> None:
    error = from_call_failure(failure, "model")
    assert isinstance(error, ApiError)
    assert ErrorReason.Name(error.reason) == reason
    assert (error.retry_after_s is not None) == retried


def test_only_known_metadata_goes_on() -> None:
    failure = _failure(StatusCode.DATA_LOSS, "RECORD_CORRUPT", number="3", path="/secret")
    error = from_call_failure(failure, "model")
    assert isinstance(error, ApiError) and error.metadata == {"number": "3"}


@pytest.mark.parametrize(
    "failure",
    [
        _failure(StatusCode.INTERNAL, "INTERNAL_FAULT"),
        _failure(StatusCode.INTERNAL),
        _failure(StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    ],
)
def test_the_rest_is_the_workers_fault(failure: aio.AioRpcError) -> None:
    assert isinstance(from_call_failure(failure, "model"), WorkerFaultError)


def test_a_closed_channel_is_a_lost_worker() -> None:
    error = from_call_failure(aio.UsageError("Channel is closed."), "model")
    assert isinstance(error, ApiError) and error.reason == ErrorReason.WORKER_UNAVAILABLE


# --- the share ----------------------------------------------------------------------


@pytest.mark.parametrize(("share", "pause_s"), [(0.5, 4.0), (0.25, 12.0), (1.0, 0.0)])
def test_a_batch_is_followed_by_a_pause_in_proportion(share: float, pause_s: float) -> None:
    now = 100.0
    one = Share(share, lambda: now)
    assert one.due and one.wait_s == 0
    one.begin()
    assert not one.due and one.wait_s is None
    now += 4.0
    one.end(80_000)
    assert one.wait_s == pytest.approx(pause_s)
    assert one.due == (pause_s == 0)
    now += pause_s
    assert one.due


def test_batches_of_the_share_become_as_short_as_they_should_be() -> None:
    now = 100.0
    one = Share(0.5, lambda: now)
    for speed in (40_000, 2_000):
        for _ in range(30):
            size = one.batch_bytes
            one.begin()
            now += size / speed
            one.end(size)
        assert size / speed == pytest.approx(0.25, rel=0.2) or size == 1024
    before = one.batch_bytes
    one.begin()
    now += 60.0
    one.end()
    assert one.batch_bytes == before, "what went wrong says nothing of the speed"
