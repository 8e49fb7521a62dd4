"""The state of the cache, which is part of a workload: cold, warm or steady.

- `cold`: nothing of an earlier run is known, neither answers nor beginnings of prompts, since all
  prompts begin with words of this run alone. So what a run finds, it has made itself.
- `warm`: as cold, but what repeats in the workload is sent once beforehand, unmeasured.
- `steady`: prompts are as they are, and what is there stays there. The same run again finds all
  that it left, so only a server that nobody else loads gives the same figures, and not at once.

The words are the same eight tokens for each request, so they change no equality within a run, and
they need nothing of the server. A tierserve is also told a tag of the run, by which its entries are
removed at the end: they would take the room of others. Others may refuse the field.
"""

import asyncio
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import aiohttp

from server.bench.load import Target
from server.bench.workload import Step
from server.bench.workloads.base import BuiltWorkload
from server.bench.workloads.requests import Common
from server.bench.workloads.texts import words
from server.config.base import SERVER
from server.config.folders import cache_folder

Mode = Literal["cold", "warm", "steady"]
MODES: tuple[Mode, ...] = get_args(Mode)
DEFAULT: Mode = "cold"
"""Since only then the same command gives the same figures twice."""

_NONCE_WORDS = 8
_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=10)
# An endpoint that answers none of so many isn't asked for the rest.
_MOST_FAILURES_IN_A_ROW = 20
# Far more than a probe of a ramp has.
_SESSIONS_A_PROBE = 1 << 32

Send = Callable[[Step], Awaitable[bool]]
"""Sends a request and waits for the end of its answer; returns whether it was answered well."""


@dataclass(frozen=True, slots=True)
class CacheState:
    """In which state a run wants the cache.

    Attributes:
        mode: `cold`, `warm` or `steady`.
        run: a name of the run that no other has.
        tags: whether the endpoint is a tierserve, and so knows tags.
    """

    mode: Mode
    run: str
    tags: bool

    @property
    def tag(self) -> str:
        """The label of the run's entries; empty if they have none."""
        return f"bench-{self.run}" if self.tags and self.mode != "steady" else ""

    def common(self, common: Common, probe: int = 0) -> Common:
        """Return what a run's requests have in common, with what this state adds.

        Probes of a ramp don't feed each other: cold ones each have words of their own, and others
        go on with new sessions, while what was warmed stays known.
        """
        labels = {"cold": (self.run, probe), "warm": (self.run,), "steady": ()}
        label = labels[self.mode]
        nonce = words(0, ("nonce", *label), _NONCE_WORDS) if label else ""
        return replace(common, tag=self.tag, nonce=nonce, first_session=probe * _SESSIONS_A_PROBE)


class Warmed(NamedTuple):
    """What was sent beforehand."""

    sent: int
    failed: int
    complete: bool
    """Whether it is all that repeats in the workload."""


def new_run() -> str:
    """Return a name for a run, by chance."""
    return secrets.token_hex(6)


async def is_tierserve(target: Target) -> bool:
    """Return whether an endpoint says that it is a tierserve; one behind a proxy may not."""
    try:
        async with (
            aiohttp.ClientSession(timeout=_PROBE_TIMEOUT) as session,
            session.get(f"{target.url.rstrip('/')}/health") as response,
        ):
            return response.headers.get("Server") == SERVER
    except (aiohttp.ClientError, OSError, ValueError):
        return False


async def prepare(
    state: CacheState,
    workload: BuiltWorkload[Any],
    send: Send,
    *,
    requests: int,
    concurrency: int,
    on_progress: Callable[[int], None],
) -> Warmed:
    """Send what a warm cache knows; nothing for the other states.

    Args:
        state: what is wanted.
        workload: made with `state.common`.
        send: sends one request.
        requests: the most to send, the most frequent ones.
        concurrency: how many at a time.
        on_progress: is told how many were sent so far.

    Raises:
        ConfigError: the workload's file isn't as it was.
    """
    if state.mode != "warm":
        return Warmed(0, 0, complete=True)
    repeated = workload.repeated()
    warming = _Warming(islice(repeated, requests), send, on_progress)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(warming.run())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    is_all = not warming.gave_up and next(repeated, None) is None
    return Warmed(warming.sent, warming.failed, complete=is_all)


class _Warming:
    """Requests that several tasks send, each the next one that nobody has sent."""

    def __init__(
        self, steps: Iterator[Step], send: Send, on_progress: Callable[[int], None]
    ) -> None:
        self._steps, self._send, self._on_progress = steps, send, on_progress
        self.sent = self.failed = self._in_a_row = 0

    @property
    def gave_up(self) -> bool:
        """Whether so many requests failed that the rest wasn't sent."""
        return self._in_a_row >= _MOST_FAILURES_IN_A_ROW

    async def run(self) -> None:
        for step in self._steps:
            is_good = await self._send(step)
            self.sent += 1
            self.failed += not is_good
            self._in_a_row = 0 if is_good else self._in_a_row + 1
            self._on_progress(self.sent)
            if self.gave_up:
                return


@dataclass(frozen=True, slots=True)
class Admin:
    """Where a tierserve's admin API answers.

    Attributes:
        address: a URL, or the path of a Unix socket.
        key: `admin.key`, for a URL.
    """

    address: str
    key: str = ""


def local_admin(target: Target) -> Admin | None:
    """Return the admin socket of a tierserve of this user on this machine, if there is one."""
    parts, folder = urlsplit(target.url), cache_folder()
    if folder is None or not _is_loopback(parts.hostname or ""):
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket = folder / f"admin-{port}.sock"
    return Admin(str(socket)) if socket.is_socket() else None


async def clean(state: CacheState, admin: Admin | None) -> str | None:
    """Remove a run's entries; returns a warning where they stay.

    They are in nobody's way but for their room: no other run has their prompts.
    """
    if not state.tag:
        return None
    if admin is None:
        reason = "the endpoint's admin API isn't known (--admin)"
    else:
        try:
            reason = await _purge(admin, state.tag)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            reason = f"{admin.address} doesn't answer: {exc or type(exc).__name__}"
    if not reason:
        return None
    by_hand = f"tierserve cache purge --tag {state.tag} removes them"
    return f"the entries of this run stay in the cache until they expire, as {reason}; {by_hand}"


async def _purge(admin: Admin, tag: str) -> str:
    """Purge the entries with a tag; returns why it was refused, or nothing."""
    is_url = "://" in admin.address
    connector = None if is_url else aiohttp.UnixConnector(admin.address)
    base = admin.address.rstrip("/") if is_url else "http://admin"
    headers = {"Authorization": f"Bearer {admin.key}"} if admin.key else {}
    async with (
        aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, headers=headers) as session,
        session.post(f"{base}/purge", json={"tag": [tag]}) as response,
    ):
        return "" if response.ok else f"{admin.address} answers with status {response.status}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
