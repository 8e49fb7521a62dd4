"""How long clients wait for an engine's answer: through tierserve, and from the engine directly."""

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import NamedTuple

import orjson

ROUTE = "/v1/chat/completions"
_TOKENS = 32
_ROUNDS = 12


class _Times(NamedTuple):
    first_s: float
    total_s: float


def print_miss_times(*, through: int, directly: int) -> None:
    """Measure and print: medians of both ways, and the median of the rounds' ratios.

    In each round as many questions are asked at once, one way and then the other. The ways begin in
    turn, since what was asked first may find the engine in another state.

    Args:
        through: tierserve's port.
        directly: the engine's port.
    """
    print(f"\n{'a miss of 32 tokens':<22} {'':>10} {'directly':>10} {'through':>10} {'ratio':>7}")
    for clients in (1, 8):
        rounds: dict[int, list[_Times]] = {through: [], directly: []}
        with ThreadPoolExecutor(clients) as pool:
            for number in range(_ROUNDS):
                for port in (through, directly)[:: 1 if number % 2 else -1]:
                    times = list(pool.map(_ask, [port] * clients))
                    first, total = (statistics.mean(column) for column in zip(*times, strict=True))
                    rounds[port].append(_Times(first, total))
        for at, name in enumerate(("first token", "total")):
            ours, theirs = ([each[at] for each in rounds[port]] for port in (through, directly))
            ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
            print(f"{clients} at once{'':<13} {name:>11} {statistics.median(theirs) * 1e3:>7.1f} ms"
                  f" {statistics.median(ours) * 1e3:>7.1f} ms"
                  f" {statistics.median(ratios):>7.3f}")  # fmt: skip


def _ask(port: int) -> _Times:
    """Ask a new question for a stream of as many tokens each time, on a new connection."""
    content = f"Tell me a story of {random.getrandbits(48)} hens."
    body = orjson.dumps(
        {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0,
         "stream": True, "max_tokens": _TOKENS, "ignore_eos": True}
    )  # fmt: skip
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    began = time.perf_counter()
    connection.request("POST", ROUTE, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first_s = 0.0
    for line in response:
        if not first_s and b'"content":"' in line and b'"content":""' not in line:
            first_s = time.perf_counter() - began
    total_s = time.perf_counter() - began
    connection.close()
    status = response.headers.get("Cache-Status", "fwd=miss")
    if response.status != 200 or "fwd=miss" not in status or not first_s:
        raise ValueError(f"expected a miss, not {response.status} {status}")
    return _Times(first_s, total_s)
