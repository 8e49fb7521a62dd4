"""What happens to the cache around a run: it is warmed before, and the run's entries go after."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from server.bench.cache_state import (
    Admin,
    CacheState,
    Mode,
    Warmed,
    clean,
    is_tierserve,
    local_admin,
    new_run,
    prepare,
)
from server.bench.load import Target
from server.bench.report.progress import say
from server.bench.workload import Step
from server.bench.workloads.base import BuiltWorkload

_MOST_REQUESTS = 10_000
_CONCURRENCY = 8
_SAYS_EACH = 50


def state_for(target: Target, mode: Mode) -> CacheState:
    """Return the state that a new run wants; the target is asked whether it is a tierserve."""
    return CacheState(mode, new_run(), tags=asyncio.run(is_tierserve(target)))


@contextmanager
def entries_removed(state: CacheState, target: Target, admin: Admin | None) -> Iterator[None]:
    """Remove a run's entries at its end, however that comes.

    Args:
        state: of the run.
        target: what it asks.
        admin: where entries are removed; None looks on this machine.
    """
    try:
        yield
    finally:
        if (warning := asyncio.run(clean(state, admin or local_admin(target)))) is not None:
            say(warning)


def warm(
    state: CacheState, workload: BuiltWorkload[Any], target: Target, timeout_s: float
) -> Warmed:
    """Send what a warm cache knows, and say how that goes; nothing for other states."""
    warmed = asyncio.run(_warm(state, workload, target, timeout_s))
    if warmed.failed or not warmed.complete:
        rest = "" if warmed.complete else ", and not all that repeats was sent"
        text = f"warming: {warmed.failed:,} of {warmed.sent:,} requests failed{rest}"
        say(text)
    return warmed


async def _warm(
    state: CacheState, workload: BuiltWorkload[Any], target: Target, timeout_s: float
) -> Warmed:
    async with _sender(target, timeout_s) as send:
        return await prepare(
            state, workload, send, requests=_MOST_REQUESTS, concurrency=_CONCURRENCY,
            on_progress=_say,
        )  # fmt: skip


def _say(sent: int) -> None:
    if sent % _SAYS_EACH == 0:
        say(f"warming: {sent:,} requests sent")


@asynccontextmanager
async def _sender(target: Target, timeout_s: float) -> AsyncIterator[Any]:
    """Give what sends a request, and returns whether all of a good answer came."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    headers = {"Content-Type": "application/json", **dict(target.headers)}
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:

        async def send(step: Step) -> bool:
            try:
                async with session.post(target.url + step.path, data=step.body) as response:
                    await response.read()
                    return response.ok
            except (aiohttp.ClientError, OSError, ValueError):
                return False

        yield send
