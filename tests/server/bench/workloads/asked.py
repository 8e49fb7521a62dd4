"""What a workload's requests ask, as a test reads it."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import orjson

from server.bench.workload import Session, Workload
from server.bench.workloads import Common, build


def bodies(session: Session) -> list[dict[str, Any]]:
    return [orjson.loads(step.body) for step in session.steps]


def prompts(workload: Workload, numbers: range) -> list[str]:
    """Return the first message of each session's first request."""
    return [bodies(workload.session(n))[0]["messages"][0]["content"] for n in numbers]


def made(spec: str, **common: Any) -> Any:
    return build(spec, Common(**{"model": "m"} | common))


def of_every(workload: Workload) -> list[Session]:
    """Return some sessions, as a process makes them."""
    return [workload.session(number) for number in range(40)]


def alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many elements both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
