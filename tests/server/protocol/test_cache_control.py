"""What clients say about caching, and what they take."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.protocol.cache_control import CacheControl, parse_cache_control
from server.protocol.formats import Encoding
from tiers import Answer, Entry, State
from tiers.acceptance import Acceptance


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", CacheControl()),
        ("no-cache", CacheControl(Acceptance(no_cache=True))),
        ("No-Store , ONLY-IF-CACHED", CacheControl(Acceptance(only_if_cached=True), no_store=True)),
        ("max-age=60", CacheControl(Acceptance(max_age_s=60))),
        ('max-age="60",min-fresh = 5', CacheControl(Acceptance(max_age_s=60, min_fresh_s=5))),
        ("max-stale", CacheControl(Acceptance(max_stale_s=inf))),
        ("max-stale=30, max-stale=90", CacheControl(Acceptance(max_stale_s=30))),
        ("max-age=-1", CacheControl(Acceptance(max_age_s=0))),
        ("max-age=", CacheControl(Acceptance(max_age_s=0))),
        ("min-fresh=soon", CacheControl(Acceptance(min_fresh_s=inf))),
        ("max-stale=soon", CacheControl(Acceptance(max_stale_s=0))),
        ('private="no-cache", x-no-store=1', CacheControl()),
        (',,=;"', CacheControl()),
    ],
)
def test_directives(value: str, expected: CacheControl) -> None:
    assert parse_cache_control(value) == expected


@given(st.text())
def test_any_text_is_read(value: str) -> None:
    assert isinstance(parse_cache_control(value), CacheControl)


FRESH, STALE, FALLBACK = 50, 130, 180


@pytest.mark.parametrize(
    ("value", "takes"),
    [
        ("", {FRESH, STALE}),
        ("no-cache", set()),
        ("max-age=50", {FRESH}),
        ("max-age=49", set()),
        ("max-age=1000", {FRESH}),
        ("max-age=49, max-stale=1", {FRESH}),
        ("min-fresh=50", {FRESH}),
        ("min-fresh=51", set()),
        ("min-fresh=0", {FRESH}),
        ("max-stale", {FRESH, STALE, FALLBACK}),
        ("max-stale=29", {FRESH}),
        ("max-stale=0", {FRESH}),
        ("max-stale=30", {FRESH, STALE}),
        ("max-stale=80", {FRESH, STALE, FALLBACK}),
        ("max-age=100, max-stale=80", {FRESH, STALE, FALLBACK}),
        ("max-age=100, max-stale=30", {FRESH, STALE}),
    ],
)
def test_what_is_taken(value: str, takes: set[int]) -> None:
    # Stored at 0, fresh until 100, given while a new one is made until 150.
    entry = Entry(Answer(Encoding.JSON, b""), 0, 100, 0, 50, 1000)
    control = parse_cache_control(value)
    ages = {
        age
        for age in (FRESH, STALE, FALLBACK)
        if control.acceptance.accepts(entry, entry.state(age), age)
    }
    assert ages == takes
    assert entry.state(FALLBACK) is State.STALE_IF_ERROR
