"""The retry rules, without any I/O."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from memsvc.client import NO_RETRIES, ApiError, RetryPolicy
from memsvc.client.errors import _BY_CODE, error_class
from memsvc.client.retry import may_succeed_later


def failure(code: str, retry_after_s: float | None = None) -> ApiError:
    return error_class(code, "")("", code=code, retry_after_s=retry_after_s)


def test_unavailable_is_retried_and_exhausted_only_with_a_hint() -> None:
    assert may_succeed_later(failure("UNAVAILABLE"))
    assert may_succeed_later(failure("CANCELLED"))
    assert may_succeed_later(failure("RESOURCE_EXHAUSTED", 0.5))
    assert not may_succeed_later(failure("RESOURCE_EXHAUSTED"))


def test_nothing_else_is_retried() -> None:
    retried = {"UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"}
    for code in set(_BY_CODE) - retried | {"INTERNAL", "UNKNOWN"}:
        assert RetryPolicy().wait_s(1, failure(code, 1.0), None) is None, code


@given(attempt=st.integers(1, 40), seed=st.integers())
def test_wait_doubles_up_to_the_ceiling_and_stays_within_its_half(attempt: int, seed: int) -> None:
    policy = RetryPolicy(attempts=50, initial_s=0.1, ceiling_s=5, source=random.Random(seed))
    wait = policy.wait_s(attempt, failure("UNAVAILABLE"), None)
    assert wait is not None
    whole = min(5, 0.1 * 2 ** (attempt - 1))
    assert whole / 2 <= wait <= whole


@given(hint=st.floats(0, 60))
def test_the_servers_hint_is_a_lower_bound(hint: float) -> None:
    wait = RetryPolicy().wait_s(1, failure("RESOURCE_EXHAUSTED", hint), None)
    assert wait is not None
    assert wait >= hint


def test_attempts_end() -> None:
    policy = RetryPolicy(attempts=3)
    waits = [policy.wait_s(attempt, failure("UNAVAILABLE"), None) for attempt in (1, 2, 3)]
    assert [wait is None for wait in waits] == [False, False, True]
    assert NO_RETRIES.wait_s(1, failure("UNAVAILABLE"), None) is None


def test_a_wait_past_the_deadline_gives_up() -> None:
    assert RetryPolicy().wait_s(1, failure("UNAVAILABLE", 10.0), remaining_s=9.0) is None
    assert RetryPolicy().wait_s(1, failure("UNAVAILABLE", 1.0), remaining_s=9.0) is not None
