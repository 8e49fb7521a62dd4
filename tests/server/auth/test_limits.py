"""Limits of a tenant, in a time of their own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.auth.limits import Limits, RateLimiter, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_may_come_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    account = RateLimiter(Limits(requests_per_minute=3), clock)
    assert [account.acquire() for _ in range(3)] == [None] * 3
    refusal = account.acquire()
    assert refusal is not None
    assert refusal.retry_after_s == 20
    clock.now += 19
    assert account.acquire().retry_after_s == 1
    clock.now += 1
    assert account.acquire() is None
    assert account.acquire() is not None
    assert (account.requests, account.active) == (4, 4)
    assert account.refused == {"requests_per_minute": 3, "max_requests": 0}


def test_headers_tell_what_is_left_and_when_all_is_there_again() -> None:
    clock = Clock()
    account = RateLimiter(Limits(requests_per_minute=10), clock)
    assert account.headers == rate_headers(10, "10", "0ms")
    account.acquire()
    assert account.headers == rate_headers(10, "9", "6s")
    clock.now += 5.9
    assert account.headers == rate_headers(10, "9", "100ms")
    for _ in range(9):
        account.acquire()
    assert account.headers == rate_headers(10, "0", "55s")
    clock.now += 3600
    assert account.headers == rate_headers(10, "10", "0ms")
    assert RateLimiter(Limits(max_requests=1)).headers == {}


def rate_headers(limit: int, left: str, reset: str) -> dict[str, str]:
    names = ("limit", "remaining", "reset")
    values = (str(limit), left, reset)
    return {f"x-ratelimit-{n}-requests": v for n, v in zip(names, values, strict=True)}


def test_only_so_many_are_under_way() -> None:
    account = RateLimiter(Limits(requests_per_minute=100, max_requests=2), Clock())
    assert account.acquire() is account.acquire() is None
    refusal = account.acquire()
    assert refusal is not None
    assert refusal.retry_after_s == 1
    # What is refused for that takes nothing of the minute's.
    assert account.headers["x-ratelimit-remaining-requests"] == "98"
    account.release()
    assert account.acquire() is None


def test_limits_change_and_what_is_used_stays() -> None:
    clock = Clock()
    account = RateLimiter(Limits(requests_per_minute=1, max_requests=5), clock)
    account.acquire()
    account.set_limits(Limits(requests_per_minute=1, max_requests=2))
    assert account.acquire() is not None
    account.set_limits(Limits(max_requests=2))
    assert account.acquire() is None
    assert account.acquire() is not None
    account.set_limits(Limits(requests_per_minute=2))
    refusal = account.check()
    assert refusal is not None
    assert account.acquire() == refusal
    clock.now += 30
    assert account.check() is account.acquire() is None


@given(
    per_minute=st.integers(1, 1000),
    waits=st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=200),
)
def test_never_more_than_a_minutes_worth_and_what_was_filled(per_minute, waits) -> None:
    clock = Clock()
    account = RateLimiter(Limits(requests_per_minute=per_minute), clock)
    let_in = 0
    for wait in waits:
        clock.now += wait
        refusal = account.acquire()
        let_in += refusal is None
        passed = clock.now - 1000
        assert let_in <= per_minute + passed * per_minute / 60 + 1e-6
        if refusal is not None:
            assert 1 <= refusal.retry_after_s <= 60
            clock.now += refusal.retry_after_s
            assert account.acquire() is None
            let_in += 1


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0ms"), (0.0001, "1ms"), (0.02, "20ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s")],
)
def test_durations_are_as_openai_writes_them(seconds: float, written: str) -> None:
    assert duration(seconds) == written
