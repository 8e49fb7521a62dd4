"""Requests with a common beginning have nothing else in common."""

from collections import Counter

import orjson
import pytest

from tests.server.bench.workloads.asked import bodies, made


def test_requests_share_their_system_prompt_only() -> None:
    workload = made("prefix:systems=4,system=100,tail=10")
    asked = [bodies(workload.session(number))[0] for number in range(2000)]
    systems = Counter(each["messages"][0]["content"] for each in asked)
    assert len(systems) == 4
    assert all(often == pytest.approx(500, abs=130) for often in systems.values())
    assert {len(system.split()) for system in systems} == {100}
    assert len({each["messages"][1]["content"] for each in asked}) == 2000


def test_system_prompts_may_follow_zipf() -> None:
    workload = made("prefix:systems=2,s=1")
    warm = [orjson.loads(step.body)["messages"][0] for step in workload.repeated()]
    used = [bodies(workload.session(number))[0]["messages"][0] for number in range(3000)]
    assert used.count(warm[0]) == pytest.approx(2000, abs=160)
    assert used.count(warm[0]) + used.count(warm[1]) == 3000


def test_warming_sends_no_request_of_the_run() -> None:
    workload = made("prefix:tail=0")
    warm = {step.body for step in workload.repeated()}
    assert len(warm) == 8
    assert not warm & {workload.session(number).steps[0].body for number in range(1000)}
