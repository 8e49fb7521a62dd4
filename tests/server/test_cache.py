"""The first rule that matches counts, within what an upstream says."""

import pytest

from server.config.schema import CacheConfig
from server.protocol.cache_control import FreshnessRules, limit_freshness
from tiers import Freshness


def test_the_first_rule_that_matches_counts() -> None:
    rules = [
        {"model": "small-*", "route": "/v1/completions", "ttl_s": 1},
        {"model": "small-*", "ttl_s": 2, "stale_if_error_s": 9},
        {"route": "/v1/completions", "ttl_s": 3},
        {"model": "tiny", "stale_while_revalidate_s": 7},
    ]
    of = FreshnessRules(
        CacheConfig.model_validate({"ttl_s": 4, "stale_if_error_s": 5, "rules": rules})
    ).of
    assert of("/v1/completions", "small-a") == Freshness(1, 0, 5)
    assert of("/v1/chat/completions", "small-a") == Freshness(2, 0, 9)
    assert of("/v1/completions", "large") == Freshness(3, 0, 5)
    assert of("/v1/chat/completions", "large") == Freshness(4, 0, 5)
    assert of("/v1/chat/completions", "tiny") == Freshness(4, 7, 5)


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("", Freshness(60, 5, 7)),
        ("public, no-transform", Freshness(60, 5, 7)),
        ("no-store", None),
        ("Private", None),
        ("no-cache, max-age=60", None),
        ("max-age=9", Freshness(9, 5, 7)),
        ("max-age=99", Freshness(60, 5, 7)),
        ("max-age=soon", Freshness(0, 5, 7)),
        ("max-age=9, s-maxage=8", Freshness(8)),
        ("must-revalidate", Freshness(60)),
        ("max-age=9, proxy-revalidate", Freshness(9)),
    ],
)
def test_an_upstream_may_shorten_it(control: str, expected: Freshness | None) -> None:
    assert limit_freshness(control, Freshness(60, 5, 7), is_stream=False) == expected
    if "no-cache" not in control:
        assert limit_freshness(control, Freshness(60, 5, 7), is_stream=True) == expected


def test_of_a_stream_no_cache_says_nothing() -> None:
    assert limit_freshness("no-cache", Freshness(60), is_stream=True) == Freshness(60)
