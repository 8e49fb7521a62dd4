"""Limits and turns over all workers: several in this process, and real ones that are killed."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.auth.limits import NO_LIMITS, Limits, LocalUsage, RateLimiter
from server.handlers.variants import Variants
from server.workers.shared_counters import SharedCounters
from tests.server.auth.test_limits import Clock

WORKERS = 3


@contextmanager
def workers(rows: int = 64) -> Iterator[list[SharedCounters]]:
    master = SharedCounters.create(WORKERS, rows=rows)
    opened = [SharedCounters.open(master.fd, number) for number in range(WORKERS)]
    try:
        yield [*opened, master]
    finally:
        for counters in (*opened, master):
            counters.close()


def limiter(counters: SharedCounters, name: str, limits: Limits, clock: Clock) -> RateLimiter:
    return RateLimiter(limits, clock, partial(counters.usage, name))


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.lists(
        st.tuples(st.integers(0, WORKERS - 1), st.sampled_from(["acquire", "release", "die"]),
                  st.floats(0, 9)),
        max_size=60,
    ),
)  # fmt: skip
def test_workers_together_are_limited_like_one_process(most, per_minute, steps) -> None:
    clock, limits = Clock(), Limits(per_minute, most)
    one = RateLimiter(limits, clock)
    with workers() as opened:
        *each, master = opened
        limiters = [limiter(counters, "t", limits, clock) for counters in each]
        for number, step, wait_s in steps:
            clock.now += wait_s
            shared = limiters[number]
            if step == "acquire":
                assert shared.check() == one.check()
                assert shared.acquire() == one.acquire()
                assert shared.headers == one.headers
            elif step == "release" and shared.active:
                shared.release()
                one.release()
            elif step == "die":
                for _ in range(shared.active):
                    one.release()
                master.forget(number)
                limiters[number] = limiter(each[number], "t", limits, clock)
            assert sum(each.active for each in limiters) == one.active <= most


def test_names_have_limits_of_their_own() -> None:
    clock, limits = Clock(), Limits(max_requests=1)
    with workers() as (first, second, *_):
        a = limiter(first, "a", limits, clock)
        b = limiter(second, "b", limits, clock)
        assert a.acquire() is b.acquire() is None
        assert limiter(second, "a", limits, clock).acquire() is not None


def test_what_is_under_way_counts_when_limits_come_and_goes_when_they_go() -> None:
    clock, limits = Clock(), Limits(max_requests=2)
    with workers() as (first, second, *_):
        changing = limiter(first, "a", NO_LIMITS, clock)
        other = limiter(second, "a", limits, clock)
        assert changing.acquire() is other.acquire() is None
        assert other.acquire() is None
        other.release()
        changing.set_limits(limits)
        assert changing.check() is not None
        assert other.acquire() is not None
        changing.set_limits(NO_LIMITS)
        assert other.acquire() is None
        # Its end must not count for those that are limited.
        changing.release()
        assert other.acquire() is not None


def test_rows_are_used_again_and_the_last_one_is_shared() -> None:
    clock, limits = Clock(), Limits(60, max_requests=1)
    with workers(rows=4) as (first, second, *_):
        for number in range(20):
            gone = limiter(first, f"gone {number}", limits, clock)
            assert gone.acquire() is None
            gone.set_limits(NO_LIMITS)
        kept = [limiter(first, f"kept {number}", limits, clock) for number in range(4)]
        assert [each.acquire() for each in kept] == [None] * 4
        beyond = [limiter(second, f"beyond {number}", limits, clock) for number in range(2)]
        assert beyond[0].acquire() is None
        # No limit is exceeded, but these share theirs.
        assert beyond[1].acquire() is not None
        beyond[1].set_limits(NO_LIMITS)
        assert beyond[0].check() is not None
        beyond[0].release()
        assert beyond[0].acquire() is None
        assert [each.acquire() is None for each in kept] == [False] * 4


def test_a_worker_that_stops_with_the_lock_stops_nobody() -> None:
    clock = Clock()
    with workers() as (first, second, *_):
        waiting = limiter(second, "a", Limits(max_requests=5), clock)
        assert first.lock()
        refused = waiting.acquire()
        assert refused is not None
        assert refused.retry_after_s == 1
        assert waiting.active == 0
        first.unlock()
        assert waiting.acquire() is None


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(1, 64))))
def test_variants_take_turns_over_workers(steps: list[tuple[int, str, int]]) -> None:
    one = Variants()
    with workers() as opened:
        each = [Variants(counters.turns) for counters in opened]
        for number, key, count in steps:
            assert each[number].next(key, count) == one.next(key, count)


def test_local_usage_keeps_the_contract() -> None:
    usage, limits = LocalUsage(1), Limits(max_requests=2)
    assert usage.begin(limits, 0.0) is None
    assert usage.begin(limits, 0.0) is not None
    usage.end()
    assert usage.active == 1


WORKER = """
import sys
from server.auth.limits import Limits
from server.workers.shared_counters import SharedCounters

fd, worker, most, per_minute = map(int, sys.argv[1:])
counters = SharedCounters.open(fd, worker)
usage = counters.usage("t")
limits = Limits(per_minute, most)
print("ready", flush=True)
let_in = 0
while sys.stdin.readline():
    # All at one moment, so that the bucket doesn't fill meanwhile.
    for _ in range(2000):
        if usage.begin(limits, 1000.0) is None:
            let_in += 1
            # Without the lock, one may begin that was looked at, after another one has ended.
            assert counters.lock(240)
            assert usage.active <= most
            counters.unlock()
            usage.end()
    print(let_in, flush=True)
"""


def worker(master: SharedCounters, number: int, most: int, per_minute: int) -> subprocess.Popen:
    arguments = map(str, (master.fd, number, most, per_minute))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[master.fd],
    )  # fmt: skip


def test_processes_that_race_and_die_exceed_no_limit() -> None:
    chance = random.Random(1)
    per_minute = 3000
    master = SharedCounters.create(WORKERS)
    usage = master.usage("t")
    racing = [worker(master, number, 2, per_minute) for number in range(WORKERS)]
    try:
        for each in racing:
            assert each.stdout.readline() == "ready\n"
            each.stdin.write("go\n" * 2)
            each.stdin.flush()
        totals = [[int(each.stdout.readline()) for _ in range(2)][-1] for each in racing]
        assert sum(totals) == per_minute
        assert usage.active == 0
        # Now they are killed at any moment, the lock held or not, and replaced.
        for _ in range(8):
            number = chance.randrange(WORKERS)
            racing[number].stdin.write("go\n" * 100)
            racing[number].stdin.flush()
            assert racing[number].stdout.readline()
            racing[number].kill()
            racing[number].communicate()
            master.forget(number)
            assert usage.active == 0
            racing[number] = worker(master, number, 2, per_minute)
            assert racing[number].stdout.readline() == "ready\n"
        assert usage.begin(Limits(max_requests=1), 0.0) is None
        assert usage.begin(Limits(max_requests=1), 0.0) is not None
    finally:
        for each in racing:
            each.kill()
            each.communicate()
        master.close()


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_lock_is_free_when_its_holder_ends(is_killed: bool) -> None:
    program = (
        "import os, signal, sys\n"
        "from server.workers.shared_counters import SharedCounters\n"
        "assert SharedCounters.open(int(sys.argv[1]), 0).lock()\n"
        f"{is_killed} and os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    master = SharedCounters.create(1)
    command = [sys.executable, "-c", program, str(master.fd)]
    ended = subprocess.run(command, pass_fds=[master.fd], check=False)
    assert ended.returncode == (-9 if is_killed else 0)
    assert master.lock()
    assert os.fstat(master.fd).st_size > 0
    master.close()
