"""The parts of the benchmark: each prints figures, and returns the promises that were broken."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from statistics import median

from fleet import Fleet, Replica, Reply

_KEYS = 100
_GENERATION_MS = 100
_PURGES = 20
_PROMPTS = 200
_OUTAGE_S = 8.0
_ANSWERS = 2000
_LEASE_S = 6.0
"""After which the lease of a replica that has died is free."""


async def generations(fleet: Fleet) -> list[str]:
    """Ask for each key at both replicas."""
    broken = []
    cases = {"at both at once": 0.0, "30 ms after": 0.03, "150 ms after": 0.15}
    for name, after_s in cases.items():

        async def both(after_s: float = after_s) -> list[Reply]:
            prompt = fleet.prompt()

            async def second() -> Reply:
                await asyncio.sleep(after_s)
                return await fleet.b.ask(prompt, seed=_GENERATION_MS)

            first = [fleet.a.ask(prompt, seed=_GENERATION_MS) for _ in range(2)]
            return await asyncio.gather(*first, second(), second())

        before = await fleet.generated()
        replies: list[Reply] = []
        for _ in range(_KEYS // 10):
            for four in await asyncio.gather(*(both() for _ in range(10))):
                replies += four
        made = await fleet.generated() - before
        failed = sum(reply.status != 200 for reply in replies)
        slowest_s = max(reply.took_s for reply in replies)
        print(f"{name}: {made / _KEYS:.2f} generations for each of {_KEYS} keys, 4 requests each; "
              f"{failed} failed; slowest {slowest_s:.2f} s")  # fmt: skip
        if failed:
            broken.append(f"{failed} requests failed")
        if made > 1.05 * _KEYS:
            broken.append(f"{made} generations of {_KEYS} keys")
    return broken


async def purges(fleet: Fleet) -> list[str]:
    """Purge at one replica while clients ask the other."""
    wrong, seen_s, answered_s, asked = 0, [], [], 0
    for number in range(_PURGES):
        prompt, cache = fleet.prompt(), {"tags": [f"doc-{number}"]}
        for replica in (fleet.a, fleet.b, fleet.b, fleet.b):
            old = await replica.ask(prompt, cache=cache)
        purging, began = asyncio.create_task(fleet.a.purge(tag=cache["tags"][0])), time.monotonic()
        seen = None
        # Ten requests after the purge was answered.
        left = 10
        while left:
            was_answered = purging.done()
            reply = await fleet.b.ask(prompt, cache=cache)
            asked += 1
            if reply.begun != old.begun and seen is None:
                seen = time.monotonic() - began
            if was_answered:
                left -= 1
                wrong += reply.begun == old.begun
        if (status := await purging) != 200:
            return [f"a purge was answered with {status}"]
        answered_s.append(time.monotonic() - began)
        seen_s.append(seen or time.monotonic() - began)
    p50_ms, max_ms = median(seen_s) * 1000, max(seen_s) * 1000
    print(f"{_PURGES} purges among {asked} requests: the other replica knows after {p50_ms:.0f} ms "
          f"(p50), {max_ms:.0f} ms (max), and the purge is answered after "
          f"{median(answered_s):.1f} s; wrong answers after that: {wrong}")  # fmt: skip
    return [f"{wrong} purged answers"] if wrong else []


async def routing(fleet: Fleet) -> list[str]:
    """Compare where both replicas send prompts with a beginning of 1,000 characters."""
    broken = []
    for name, clients in (("idle", 0), ("with 32 clients more", 32)):
        stopped = asyncio.Event()

        async def load(replica: Replica, stopped: asyncio.Event = stopped) -> None:
            while not stopped.is_set():
                await replica.ask(fleet.prompt() + " and why? " * 400, seed=200)

        loads = [asyncio.create_task(load((fleet.a, fleet.b)[n % 2])) for n in range(clients)]
        same, engines = 0, set()
        for number in range(_PROMPTS):
            text = f"{name} document {number}: " + "the same words again " * 50
            cache = {"mode": "no-store"}
            one, two = await asyncio.gather(
                *(replica.ask(text, cache=cache) for replica in (fleet.a, fleet.b))
            )
            same += one.engine == two.engine
            engines |= {one.engine, two.engine}
        stopped.set()
        await asyncio.gather(*loads)
        print(f"{name}: {same / _PROMPTS:.0%} of {_PROMPTS} prompts go to the same engine from "
              f"both, of {len(engines)} engines")  # fmt: skip
        if not clients and same < _PROMPTS:
            broken.append(f"{_PROMPTS - same} prompts go elsewhere from an idle replica")
    return broken


async def kill(fleet: Fleet) -> list[str]:
    """Kill the first replica under load, and while it generates what the second waits for."""
    stopped, replies = asyncio.Event(), {"front1": [], "front2": []}  # type: ignore[var-annotated]
    killed_at = 0.0

    async def load(name: str, replica: Replica) -> None:
        while not stopped.is_set():
            began = time.monotonic()
            reply = await replica.ask(fleet.prompt(), seed=50)
            replies[name].append((began, reply.status))
            if reply.status == 0:
                # As a load balancer would, it leaves a replica that refuses.
                return

    clients = [(fleet.a.machine.name, fleet.a), (fleet.b.machine.name, fleet.b)] * 8
    loads = [asyncio.create_task(load(*client)) for client in clients]
    await asyncio.sleep(2)
    prompt = fleet.prompt()
    held = asyncio.create_task(fleet.a.ask(prompt, seed=2000))
    await asyncio.sleep(0.5)
    waiting = asyncio.create_task(fleet.b.ask(prompt, seed=2000))
    await asyncio.sleep(0.5)
    killed_at = time.monotonic()
    await fleet.a.kill()
    reply = await waiting
    took_s = time.monotonic() - killed_at
    await asyncio.sleep(1)
    stopped.set()
    await asyncio.gather(*loads)
    await held
    at_a = [began for began, status in replies["front1"] if status != 200]
    at_b = sum(status != 200 for _, status in replies["front2"])
    under_way = sum(began <= killed_at for began in at_a)
    print(f"killed under load: of the killed one {under_way} requests under way failed, "
          f"{len(at_a) - under_way} that came later; of {len(replies['front2'])} at the other "
          f"{at_b} failed; what it waited for came after {took_s:.1f} s, 2 of them the "
          f"generation")  # fmt: skip
    await fleet.a.close()
    await fleet.a.start()
    broken = [f"{at_b} requests failed at the other replica"] if at_b else []
    if reply.status != 200 or took_s > _LEASE_S + 2 + 3:
        broken.append(f"the other replica waited {took_s:.1f} s for a dead one: {reply.status}")
    return broken


async def redis(fleet: Fleet) -> list[str]:
    """Have Redis be slow, stop and be unplugged, while the second replica is asked."""
    broken = []
    ways: dict[str, Callable[[bool], None]] = {
        "slow": fleet.slow_redis,
        "stopped": fleet.stop_redis,
        "unplugged": lambda begins: fleet.redis.connect(not begins),
    }
    for name, way in ways.items():
        known = [fleet.prompt() for _ in range(20)]
        for prompt in known * 3:
            await fleet.b.ask(prompt)
        way(True)
        hits, misses = await _ask_for(fleet, known, _OUTAGE_S)
        way(False)
        back_s = await _until(lambda: _is_available(fleet.b))
        failed = sum(reply.status != 200 for reply in (*hits, *misses))
        gone = sum("hit" not in reply.cache_status for reply in hits)
        print(f"{name}: {len(hits)} hits, {_ms(hits)}; {len(misses)} misses, {_ms(misses)}; "
              f"{failed} failed; {gone} known ones were misses; the tier is back {back_s:.1f} s "
              f"after Redis")  # fmt: skip
        if failed:
            broken.append(f"{name}: {failed} requests failed")
        if gone and fleet.when_unreachable == "serve":
            broken.append(f"{name}: {gone} of {len(hits)} known answers weren't found")
    return broken


async def partition(fleet: Fleet) -> list[str]:
    """Cut the second replica off from Redis, purge on both sides, and join them again."""
    broken = []
    prompts = {name: fleet.prompt() for name in ("by-a", "by-b", "kept")}
    old: dict[str, int] = {}
    for name, prompt in prompts.items():
        for replica in (fleet.a, fleet.b, fleet.b, fleet.b, fleet.a):
            old[name] = (await replica.ask(prompt, cache={"tags": [name]})).begun
    fleet.b.machine.reach(fleet.redis, is_reached=False)
    await _until(lambda: _is_unavailable(fleet.b))
    statuses = await fleet.b.purge(tag="by-b"), await fleet.a.purge(tag="by-a")
    # What B generates now knows its own purge, which nobody else does.
    late = fleet.prompt()
    late_begun = (await fleet.b.ask(late, cache={"tags": ["late"]})).begun
    statuses = *statuses, await fleet.a.purge(tag="late")
    served = [await fleet.b.ask(prompts["by-a"], cache={"tags": ["by-a"]}) for _ in range(10)]
    blind = sum(reply.begun == old["by-a"] for reply in served)
    fleet.b.machine.reach(fleet.redis, is_reached=True)
    joined_at = time.monotonic()
    back_s = await _until(lambda: _is_available(fleet.b))
    await asyncio.sleep(0.5)
    again = 0
    gone = {prompts["by-a"]: old["by-a"], prompts["by-b"]: old["by-b"], late: late_begun}
    tags = {prompts["by-a"]: "by-a", prompts["by-b"]: "by-b", late: "late"}
    while time.monotonic() < joined_at + back_s + 3:
        for prompt, begun in gone.items():
            for replica in (fleet.a, fleet.b):
                again += (await replica.ask(prompt, cache={"tags": [tags[prompt]]})).begun == begun
    kept = await fleet.b.ask(prompts["kept"], cache={"tags": ["kept"]})
    print(f"purges were answered {statuses} (the first by the one that was cut off); meanwhile "
          f"{blind} of {len(served)} answers were purged ones; back after {back_s:.1f} s; purged "
          f"answers that came back: {again}; one not purged: {kept.cache_status}")  # fmt: skip
    if again:
        broken.append(f"{again} purged answers came back")
    if blind and fleet.when_unreachable == "miss":
        broken.append(f"{blind} purged answers, though nothing should be served")
    if "hit" not in kept.cache_status:
        broken.append("what wasn't purged is gone")
    return broken


async def sizes(fleet: Fleet) -> list[str]:
    """Tell what an answer of 500 words costs in each place."""
    idle, began, used = fleet.redis_info(), time.monotonic(), fleet.a.cpu_s()
    await asyncio.sleep(5)
    polls = (_commands(fleet.redis_info()) - _commands(idle)) / 5
    idle_cpu = (fleet.a.cpu_s() - used) / (time.monotonic() - began)
    prompts = [fleet.prompt() + " and why? " * 50 for _ in range(_ANSWERS)]
    print(f"idle: each replica sends Redis {polls / 2:.0f} commands/s and takes {idle_cpu:.1%} of "
          f"a core, with {fleet.a.memory_bytes() / 1e6:.0f} MB of its own memory")  # fmt: skip
    for name, replica in (("misses", fleet.a), ("hits of Redis", fleet.b), ("again", fleet.b)):
        before, disk, used = fleet.redis_info(), replica.disk_bytes(), replica.cpu_s()
        memory, began = replica.memory_bytes(), time.monotonic()
        waiting = iter(prompts)

        async def client(replica: Replica = replica, waiting: Iterator[str] = waiting) -> None:
            for prompt in waiting:
                await replica.ask(prompt, max_tokens=500)

        await asyncio.gather(*(client() for _ in range(16)))
        seconds, cpu_s = time.monotonic() - began, replica.cpu_s() - used
        await asyncio.sleep(1)
        after = fleet.redis_info()
        commands = _commands(after) - _commands(before) - polls * (seconds + 1)
        held = after["used_memory"] - before["used_memory"]
        print(f"{name}: {commands / _ANSWERS:.1f} Redis commands each, {held / _ANSWERS:.0f} bytes "
              f"in Redis, {(replica.disk_bytes() - disk) / _ANSWERS:.0f} on disk, "
              f"{(replica.memory_bytes() - memory) / _ANSWERS:.0f} of memory; "
              f"{cpu_s / _ANSWERS * 1000:.2f} ms of CPU")  # fmt: skip
    return []


def _commands(info: dict[str, float]) -> float:
    return sum(calls for name, calls in info.items() if name.startswith("cmdstat_"))


async def _ask_for(
    fleet: Fleet, known: Sequence[str], seconds: float
) -> tuple[list[Reply], list[Reply]]:
    """Ask the second replica for known answers and new ones, one after another."""
    until, hits, misses = time.monotonic() + seconds, [], []
    while time.monotonic() < until:
        for prompt in known:
            hits.append(await fleet.b.ask(prompt))
            await asyncio.sleep(0.005)
        misses.append(await fleet.b.ask(fleet.prompt()))
    return hits, misses


async def _until(is_so: Callable[[], Awaitable[bool]]) -> float:
    """Wait until something is so; returns seconds. Raises `TimeoutError` after a minute."""
    began = time.monotonic()
    async with asyncio.timeout(60):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def _is_available(replica: Replica) -> bool:
    return await replica.metric('tierserve_tier_available{tier="shared"}') == 1


async def _is_unavailable(replica: Replica) -> bool:
    return not await _is_available(replica)


def _ms(replies: Sequence[Reply]) -> str:
    took = sorted(reply.took_s * 1000 for reply in replies)
    return f"p50 {median(took):.1f} ms, p99 {took[len(took) * 99 // 100]:.0f}, max {took[-1]:.0f}"


PARTS: dict[str, Callable[[Fleet], Awaitable[list[str]]]] = {
    "generations": generations,
    "purges": purges,
    "routing": routing,
    "kill": kill,
    "redis": redis,
    "partition": partition,
    "sizes": sizes,
}
