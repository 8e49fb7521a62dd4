"""Outcomes, as tierserve and others send them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.clients.outcomes import MOST_NAMES, Outcomes, of_cache_status, reads_headers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tierserve; hit; ttl=3600; detail=memory", "memory"),
        ("tierserve; hit; ttl=3; detail=disk", "disk"),
        ("tierserve; hit; ttl=0; detail=shared", "shared"),
        ("tierserve;hit", "hit"),
        ('tierserve; hit; detail="a long story"', "hit"),
        ("tierserve; hit; ttl=-5; detail=memory", "stale"),
        ("tierserve; fwd=stale; fwd-status=503; ttl=-9; detail=memory", "stale"),
        ("tierserve; fwd=stale", "revalidated"),
        ("tierserve; fwd=request", "request"),
        ("tierserve; fwd=miss; collapsed", "collapsed"),
        ("tierserve; fwd=miss", "miss"),
        ("tierserve; fwd=uri-miss", "miss"),
        ("tierserve; fwd=bypass", "bypass"),
        ("tierserve; detail=only-if-cached", "uncached"),
        ("tierserve; fwd=miss, tierserve; hit; detail=memory", "memory"),
        ("tierserve; hit; detail=disk, tierserve; fwd=bypass", "disk"),
        ("tierserve; fwd=miss, cdn; hit; detail=edge", "hit"),
        ("tierserve; fwd=request, cdn; fwd=bypass", "request"),
        ("origin; fwd=miss, cdn; fwd=bypass", "bypass"),
        ('"a, b; hit"; fwd=miss', "miss"),
        ('tierserve; fwd=miss; detail="a \\"quoted\\" hit, really; hit"', "miss"),
        ("HIT", "hit"),
        ("EXPIRED", "revalidated"),
        ("", "uncached"),
        (";;;,,==", "uncached"),
        ('tierserve; hit; detail="never ends', "hit"),
    ],
)
def test_cache_status(value, expected) -> None:
    assert of_cache_status(value.encode()) == (expected, 0)


def test_what_the_prefix_tier_loaded() -> None:
    value = b'tierserve; fwd=miss; detail="1152 prompt tokens from disk"'
    assert of_cache_status(value) == ("miss", 1152)
    both = reads_headers()([(b"cache-status", b"origin; hit"), (b"cache-status", value)])
    assert both.loaded_tokens == 1152


@given(st.binary(max_size=200))
def test_nothing_raises(value) -> None:
    of_cache_status(value)
    for name in (b"cache-status", b"x-cache", b"age", b"x-own"):
        reads_headers()([(name, value)])
        reads_headers("x-own")([(name, value)])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"x-cache", b"HIT from proxy")], "hit"),
        ([(b"x-cache", b"Hit from cloudfront")], "hit"),
        ([(b"x-cache", b"TCP_MISS")], "miss"),
        ([(b"x-cache", b"chit-chat")], "uncached"),
        ([(b"x-litellm-cache-key", b"abc")], "hit"),
        ([(b"content-type", b"application/json")], "uncached"),
        ([], "uncached"),
    ],
)
def test_other_caches(headers, expected) -> None:
    assert reads_headers()(headers).outcome == expected


def test_a_header_of_the_users_choice() -> None:
    read = reads_headers("CF-Cache-Status")
    assert read([(b"cf-cache-status", b"HIT"), (b"cache-status", b"x; fwd=miss")]).outcome == "hit"
    assert read([(b"cf-cache-status", b"a b c")]).outcome == "other"
    assert read([(b"cache-status", b"x; hit")]).outcome == "uncached"
    assert reads_headers("cache-status")([(b"cache-status", b"Warm")]).outcome == "warm"


def test_age() -> None:
    assert reads_headers()([(b"age", b"12")]).age == 12
    assert math.isnan(reads_headers()([(b"age", b"-1")]).age)
    assert math.isnan(reads_headers()([]).age)


def test_few_names_are_told_apart() -> None:
    outcomes = Outcomes()
    numbers = [outcomes.number(f"name{number}") for number in range(1000)]
    assert outcomes.names[0] == "failed"
    assert len(outcomes.names) == MOST_NAMES + 1
    assert outcomes.names[numbers[-1]] == "other"
    assert outcomes.number("name0") == 1
