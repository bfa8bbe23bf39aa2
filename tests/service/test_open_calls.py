"""Ending calls from outside, without a server."""

from __future__ import annotations

import asyncio

import pytest

from memsvc.api_error import ApiError
from memsvc.open_calls import OpenCalls
from memsvc.principal import Principal
from memsvc.v1.errors_pb2 import ErrorReason
from storage.catalog import Scope


def principal(key_id: str = "k1", tenant: str = "t1", ends_us: int | None = None) -> Principal:
    return Principal(tenant, tenant, Scope.READ, False, key_id, None, ends_us)


async def hang(calls: OpenCalls, who: Principal, *, ends: bool = True) -> str:
    """What a call that never ends by itself ends with."""
    try:
        with calls.watch(who, ends=ends):
            await asyncio.Event().wait()
    except ApiError as error:
        return ErrorReason.Name(error.reason)
    return ""


async def running(*coroutines: object) -> list[asyncio.Task[str]]:
    tasks = [asyncio.ensure_future(one) for one in coroutines]  # type: ignore[call-overload]  # coroutines
    await asyncio.sleep(0)
    return tasks


async def test_one_keys_calls_end_and_no_others() -> None:
    calls = OpenCalls()
    first, second, other = await running(
        hang(calls, principal("k1")), hang(calls, principal("k1")), hang(calls, principal("k2"))
    )
    calls.end_key("k1", 0)
    assert await first == await second == "CREDENTIAL_INVALID"
    assert first.cancelling() == 0
    assert not other.done()
    other.cancel()


async def test_a_call_that_must_not_end_goes_on() -> None:
    calls = OpenCalls()
    (task,) = await running(hang(calls, principal(), ends=False))
    calls.end_key("k1", 0)
    calls.end_tenant("t1")
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()


async def test_a_caller_that_leaves_is_a_cancellation_still() -> None:
    calls = OpenCalls()
    task, both = await running(hang(calls, principal("k1")), hang(calls, principal("k2")))
    task.cancel()
    both.cancel()
    calls.end_key("k2", 0)
    for one in (task, both):
        with pytest.raises(asyncio.CancelledError):
            await one


async def test_ends_at_its_time_which_may_move_closer() -> None:
    now = 1000.0
    calls = OpenCalls(lambda: now)
    soon, later, moved = await running(
        hang(calls, principal("soon", ends_us=round(1000.01 * 1e6))),
        hang(calls, principal("later", ends_us=round(2000 * 1e6))),
        hang(calls, principal("moved", ends_us=round(2000 * 1e6))),
    )
    calls.end_key("moved", round(1000.02 * 1e6))
    async with asyncio.timeout(5):
        assert await soon == await moved == "CREDENTIAL_INVALID"
    assert not later.done()
    later.cancel()


async def test_nothing_is_held_of_calls_that_are_over() -> None:
    calls = OpenCalls()
    with calls.watch(principal(ends_us=2**60), ends=True):
        assert len(calls._calls) == 1
    assert not calls._calls
    calls.end_key("k1", 0)
    await asyncio.sleep(0)
