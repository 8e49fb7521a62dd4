"""When sessions begin: times computed before the run, so that no slow answer can delay them.

The times depend on the load and its seed alone, and each client process takes every n-th of them.
So all processes together send what one would send, at the same times.
"""

from hashlib import blake2b
from math import ceil, inf, isfinite, log1p

import numpy as np

from server.bench.load import Load
from server.bench.records import Floats
from server.bench.workload import Workload
from server.config.base import ConfigError

MOST_SESSIONS = 20_000_000
"""The longest schedule: its times take 160 MB."""


def due_times(load: Load, workload: Workload) -> Floats:
    """Return when each session of an open loop begins, in seconds after the start, ascending.

    The gaps of `gamma` have the shape `burstiness` and the mean `1 / rate`, so their variance is
    `1 / (burstiness * rate²)`; those of `poisson` are the ones with shape 1. A shorter run has
    the first times of a longer one.

    Raises:
        ConfigError: a rate, a burstiness or a speed can't be, the workload has no times, or there
            would be more than `MOST_SESSIONS`.
    """
    most = min(
        inf if load.sessions is None else load.sessions,
        inf if workload.count is None else workload.count,
    )
    until = inf if load.duration_s is None else load.duration_s
    if load.arrivals == "trace":
        return _of_trace(load.speed, workload, most, until)
    rate = 0.0 if load.rate is None else load.rate
    _check_positive("--rate", rate)
    expected = min(most, ceil(until * rate) if until < inf else inf)
    if expected > MOST_SESSIONS:
        text = f"should make at most {MOST_SESSIONS} sessions, not {expected}"
        raise ConfigError([f"--rate: {text}"])
    count = int(expected)
    if load.arrivals == "constant":
        return np.arange(count) / rate
    burstiness = 1.0 if load.arrivals == "poisson" else load.burstiness
    _check_positive("--burstiness", burstiness)
    return _random_times(rate, burstiness, load.seed, most, until, count)


def thinking_s(load: Load, number: int) -> float:
    """Return how long a user of a closed loop thinks before a session: exponential, by number."""
    if load.think_s <= 0:
        return 0.0
    digest = blake2b(f"{load.seed} {number}".encode(), digest_size=8).digest()
    return -load.think_s * log1p(-int.from_bytes(digest) / 2**64)


def _random_times(
    rate: float, burstiness: float, seed: int, most: float, until: float, count: int
) -> Floats:
    random, times = np.random.default_rng(seed), np.empty(0)
    while len(times) < most and (len(times) == 0 or times[-1] < until):
        # Without a bound of the number, a few draws more than expected nearly always suffice.
        more = count - len(times) if until == inf else 100 + count // 10
        gaps = random.gamma(burstiness, 1 / (rate * burstiness), int(min(more, MOST_SESSIONS)))
        # So the sums are the same, to the last bit, however many draws are made at once.
        gaps[:1] += times[-1:].sum()
        times = np.concatenate((times, np.cumsum(gaps)))
    times = times[: int(min(most, len(times)))]
    return times[times < until]


def _of_trace(speed: float, workload: Workload, most: float, until: float) -> Floats:
    _check_positive("--speed", speed)
    count = int(min(most, 1024))
    while True:
        found = workload.times(count)
        if found is None:
            text = f"trace is for workloads that have times of their own; {workload.name} has none"
            raise ConfigError([f"--arrivals: {text}"])
        times = np.asarray(found, dtype=np.float64) / speed
        if len(times) < count or count >= min(most, MOST_SESSIONS) or times[-1] >= until:
            return times[times < until]
        count = int(min(most, 4 * count, MOST_SESSIONS))


def _check_positive(option: str, value: float) -> None:
    if not (isfinite(value) and value > 0):
        raise ConfigError([f"{option}: should be greater than 0, not {value:g}"])
