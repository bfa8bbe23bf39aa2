"""Buckets, pools and quotas by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc.api_error import ApiError
from memsvc.config import Config, load_config
from memsvc.limits import QUOTAS, FairPool, Limiter, Quotas
from memsvc.limits.bucket import Bucket
from memsvc.limits.streams import received, within
from memsvc.v1 import admin_service_pb2
from memsvc.v1.errors_pb2 import ErrorReason

GET, QUERY = "/memsvc.v1.MemoryService/GetMemory", "/memsvc.v1.MemoryService/Query"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_its_rate() -> None:
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(0.0) == 0
        bucket.spend(1, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(1.0)
    assert bucket.wait_s(0.75) == pytest.approx(0.25)
    assert bucket.wait_s(1.0) == 0
    bucket.spend(1, 1.0)
    assert bucket.wait_s(1.0) == pytest.approx(1.0)


def test_debt_is_paid_back_first() -> None:
    bucket = Bucket(600, 0.0)
    bucket.spend(1200, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(60.1)
    assert bucket.wait_s(60.2) == 0
    assert not bucket.full(100.0)
    assert bucket.full(121.0)


def test_no_limit_never_waits() -> None:
    bucket = Bucket(0, 0.0)
    bucket.spend(10**12, 0.0)
    assert bucket.wait_s(0.0) == 0
    assert bucket.full(0.0)


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60),
)
def test_never_more_than_a_burst_and_the_rate(
    rate: int, calls: Sequence[tuple[float, int]]
) -> None:
    """Who asks first spends at most the burst, what was added, and one call over it."""
    now, spent, largest = 0.0, 0, 0
    bucket = Bucket(rate, now)
    for pause, cost in calls:
        now += pause
        if bucket.wait_s(now) == 0:
            bucket.spend(cost, now)
            spent += cost
            largest = max(largest, cost)
    assert spent <= rate + rate * now / 60 + largest


@given(st.integers(1, 1000), st.integers(1, 4), st.integers(0, 3))
def test_floods_leave_room_for_one_more(more: int, share: int, floods: int) -> None:
    bound = (share + 1) ** floods + more
    pool = FairPool(bound, share)
    for flood in range(floods):
        while pool.has_room(f"flood{flood}"):
            pool.take(f"flood{flood}")
    assert pool.held < bound
    pool.take("newcomer")


def test_two_floods_get_alike() -> None:
    pool = FairPool(90)
    while pool.has_room("a") or pool.has_room("b"):
        for tenant in ("a", "b"):
            if pool.has_room(tenant):
                pool.take(tenant)
    assert abs(pool.held_by("a") - pool.held_by("b")) <= 1
    assert pool.held == 80


def test_a_pool_is_given_back() -> None:
    pool = FairPool(10)
    pool.take("a", 10)  # Whoever holds nothing may have what is free.
    for tenant in ("a", "b"):
        with pytest.raises(ApiError) as caught:
            pool.take(tenant)
        assert caught.value.reason == ErrorReason.OVERLOADED
        assert caught.value.retry_after_s
    pool.give("a", 10)
    assert (pool.held, pool._held) == (0, {})


def test_quotas_are_settings_fields_and_rows() -> None:
    wire = [field.name for field in admin_service_pb2.QuotaLimits.DESCRIPTOR.fields]
    assert tuple(wire) == QUOTAS
    config = load_config({"requests_per_minute": 7, "max_documents_per_memory": 3})
    quotas = Quotas.resolve(config, {"max_documents_per_memory": 4, "gone": 1})
    assert (quotas.requests_per_minute, quotas.max_documents_per_memory) == (7, 4)


class Limited:
    """A limiter with its own clock, and quotas to change."""

    def __init__(self, own: Mapping[str, int] | None = None, **settings: object) -> None:
        self.own = dict(own or {})
        self.loads = 0
        self.clock = Clock()
        config: Config = load_config(settings)
        self.limiter = Limiter(config, self.load, self.clock)

    async def load(self, tenant_uid: str) -> Mapping[str, int]:
        self.loads += 1
        await asyncio.sleep(0)
        return self.own if tenant_uid == "t" else {}

    async def refusal(self, method: str = GET, tenant: str = "t") -> ApiError | None:
        try:
            async with self.limiter.enter(tenant, method):
                return None
        except ApiError as error:
            return error


async def test_requests_of_one_tenant_do_not_count_for_another() -> None:
    limited = Limited(requests_per_minute=3)
    for _ in range(3):
        assert await limited.refusal() is None
    refused = await limited.refusal()
    assert refused is not None
    assert refused.reason == ErrorReason.QUOTA_EXCEEDED
    assert refused.metadata == {"quota": "requests_per_minute", "limit": "3"}
    assert refused.retry_after_s == pytest.approx(20)
    assert await limited.refusal(tenant="other") is None
    limited.clock.now += 20
    assert await limited.refusal() is None


async def test_tokens_stop_what_costs_tokens_alone() -> None:
    limited = Limited(tokens_per_minute=100)
    assert await limited.refusal(QUERY) is None
    limited.limiter.spend_tokens("t", 150)
    limited.limiter.spend_tokens("unknown", 150)
    refused = await limited.refusal(QUERY)
    assert refused is not None
    assert refused.metadata["quota"] == "tokens_per_minute"
    assert refused.retry_after_s == pytest.approx(30.6)
    assert await limited.refusal(GET) is None


async def test_bytes_stop_calls_and_slow_streams_down() -> None:
    limited = Limited(bytes_per_minute=6000)
    async with limited.limiter.enter("t", GET) as admission:
        assert admission.counts_bytes
        admission.spend_bytes(6000)
        pacing = asyncio.create_task(admission.pace())
        await asyncio.sleep(0.005)
        assert not pacing.done()
        await pacing
    refused = await limited.refusal()
    assert refused is not None
    assert refused.metadata["quota"] == "bytes_per_minute"


async def test_calls_and_queries_at_once() -> None:
    limited = Limited(concurrent_calls=3, concurrent_queries=1)
    async with limited.limiter.enter("t", QUERY):
        refused = await limited.refusal(QUERY)
        assert refused is not None
        assert refused.metadata["quota"] == "concurrent_queries"
        async with limited.limiter.enter("t", GET), limited.limiter.enter("t", GET):
            refused = await limited.refusal()
            assert refused is not None
            assert refused.metadata["quota"] == "concurrent_calls"
            assert refused.retry_after_s
        assert await limited.refusal() is None
    assert await limited.refusal(QUERY) is None


async def test_the_servers_rates_hold_for_all_tenants() -> None:
    limited = Limited(server_requests_per_minute=2)
    assert await limited.refusal(tenant="a") is None
    assert await limited.refusal(tenant="b") is None
    refused = await limited.refusal(tenant="c")
    assert refused is not None
    assert refused.reason == ErrorReason.OVERLOADED
    assert refused.metadata == {"limit": "server_requests_per_minute"}
    assert refused.retry_after_s == pytest.approx(30)


async def test_a_tenants_own_quota_replaces_the_setting() -> None:
    limited = Limited({"requests_per_minute": 1}, requests_per_minute=100)
    assert await limited.refusal() is None
    assert await limited.refusal() is not None
    assert limited.loads == 1
    limited.own = {}
    limited.limiter.forget("t")
    assert await limited.refusal() is None
    assert limited.loads == 2


async def test_quotas_that_change_while_they_are_read_are_read_again() -> None:
    limited = Limited()
    reading = asyncio.create_task(limited.limiter.quotas("t"))
    await asyncio.sleep(0)
    limited.own = {"requests_per_minute": 5}
    limited.limiter.forget("t")
    assert (await reading).requests_per_minute == 5


async def test_no_call_goes_by_quotas_that_were_changed_before_it() -> None:
    """Also not while another one reads them, nor does one that reads them too begin anew."""
    limited = Limited({"requests_per_minute": 1})
    assert await limited.refusal() is None
    limited.own = {"requests_per_minute": 2}
    limited.limiter.forget("t")
    refusals = await asyncio.gather(*(limited.refusal() for _ in range(4)))
    assert [refusal is None for refusal in refusals].count(True) == 2
    limited.own = {"requests_per_minute": 7}
    limited.limiter.forget("t")
    read = await asyncio.gather(*(limited.limiter.quotas("t") for _ in range(2)))
    assert [quotas.requests_per_minute for quotas in read] == [7, 7]


async def test_what_is_inside_stays_counted_when_quotas_change() -> None:
    limited = Limited(concurrent_calls=1)
    async with limited.limiter.enter("t", GET):
        limited.limiter.forget("t")
        assert await limited.refusal() is not None
    assert await limited.refusal() is None


async def test_a_failing_catalog_is_asked_again() -> None:
    limited = Limited()

    async def fail(_: str) -> Mapping[str, int]:
        raise ConnectionError

    works, limited.limiter._load = limited.limiter._load, fail
    with pytest.raises(ConnectionError):
        await limited.limiter.quotas("t")
    limited.limiter._load = works
    assert (await limited.limiter.quotas("t")).requests_per_minute == 0


async def test_tenants_that_rest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memsvc.limits.limiter._TENANTS_KEPT", 5)
    limited = Limited(requests_per_minute=10)
    async with limited.limiter.enter("t", GET):
        for number in range(50):
            assert await limited.refusal(tenant=f"x{number}") is None
            limited.clock.now += 60
        assert "t" in limited.limiter._tenants
    assert len(limited.limiter._tenants) <= 5


async def test_time_bounds() -> None:
    with pytest.raises(ApiError) as caught:
        async with within(0.01, "stream_seconds"):
            await asyncio.sleep(5)
    assert caught.value.reason == ErrorReason.STREAM_TIMEOUT
    assert caught.value.metadata == {"quota": "stream_seconds", "limit": "0.01"}
    async with within(0, "stream_seconds"):
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with within(60, "stream_seconds"):
            raise TimeoutError  # Of something inside: not ours to rename.


async def test_messages_must_keep_coming() -> None:
    async def messages() -> AsyncIterator[int]:
        yield 1
        yield 2
        await asyncio.sleep(5)
        yield 3

    seen = []
    with pytest.raises(ApiError) as caught:
        async for message in received(messages(), 0.05):
            seen.append(message)
    assert seen == [1, 2]
    assert caught.value.metadata["quota"] == "stream_idle_s"

    async def quick() -> AsyncIterator[int]:
        yield 1

    assert [message async for message in received(quick(), 0.05)] == [1]
