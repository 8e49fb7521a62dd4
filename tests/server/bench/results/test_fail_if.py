from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.results.fail_if import parse
from server.config.base import ConfigError


def figure(a, b, low=None, high=None):
    return {"a": a, "b": b, "ratio": b / a if a else None, "low": low, "high": high}


def test_a_rule_names_a_figure_with_or_without_its_unit():
    rule = parse(" memory.ttft.p99.9 >1.1x ")
    assert (rule.figure, rule.is_more, rule.factor) == ("memory.ttft_s.p99.9", True, 1.1)
    assert parse("miss.e2e_due_s.mean < 0.9 x").figure == "miss.e2e_due_s.mean"
    assert parse("whole.e2e_due.p50 < 0.9x").figure == "whole.e2e_due_s.p50"


@pytest.mark.parametrize("text", ["", "p99 > 5ms", "a.b.c >= 1x", "a > x", "a > 0x", "a 1.1x"])
def test_a_wrong_rule_says_what_would_be_right(text):
    with pytest.raises(ConfigError, match=r"--fail-if: .*memory.ttft_s.p99 > 1.1x"):
        parse(text)


@given(st.text())
def test_any_text_is_a_rule_or_a_mistake(text):
    with suppress(ConfigError):
        assert parse(text).figure


@pytest.mark.parametrize(
    ("text", "found", "holds", "says"),
    [
        ("w.x > 1.1x", figure(1, 1.3, 1.2, 1.4), True, "holds"),
        ("w.x > 1.1x", figure(1, 1.3, 1.0, 1.7), False, "more requests would tell"),
        ("w.x > 1.1x", figure(1, 1.0, 0.9, 1.2), False, "doesn't hold"),
        ("w.x < 0.9x", figure(1, 0.5, 0.4, 0.6), True, "holds"),
        ("w.x < 0.9x", figure(1, 0.8, 0.7, 0.95), False, "more requests would tell"),
        ("w.x > 1.1x", figure(10, 12), True, "holds"),
        ("w.x > 1.1x", figure(0, 1), True, "holds"),
        ("w.x > 1.1x", figure(0, 0), False, "doesn't hold"),
    ],
)
def test_a_rule_holds_where_chance_does_not_explain_it(text, found, holds, says):
    judged = parse(text).judge({"w.x": found})
    assert judged["holds"] is holds
    assert judged["text"].endswith(says)


def test_a_figure_that_a_run_lacks_is_a_mistake():
    with pytest.raises(ConfigError, match=r"both runs should have disk.ttft_s.p50.*miss, whole"):
        parse("disk.ttft.p50 > 1x").judge({"whole.a": {}, "miss.b": {}})
