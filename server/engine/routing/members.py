"""The upstreams of one model, which may change while it runs.

Invariants: one that stays keeps its connections, its counts and what is known of its health;
requests under way at one that leaves end undisturbed, and its connections are closed after the last
of them.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from server.auth.limits import Limits, LimitUsage
from server.engine.routing.addresses import UpstreamAddress
from server.engine.routing.load import Estimate, UpstreamLoad
from server.engine.upstream import Upstream

# As often as probes: an engine's metrics cost it some milliseconds.
_READ_EVERY_S = 2.0


@dataclass(eq=False, slots=True)
class Member:
    """An upstream, and what it has to do."""

    address: UpstreamAddress
    upstream: Upstream
    load: UpstreamLoad
    has_left: bool = False


class Members:
    """The upstreams of one model.

    Args:
        addresses: of each; equal ones are one.
        make: returns the upstream at an address.
        usage_of: returns what counts the requests at the upstream of that name.
        reads_queues: whether they say how many requests they have, those of others too.
        limits: of the requests at each.
        estimate: of the model's prompts.
    """

    def __init__(
        self,
        addresses: Iterable[UpstreamAddress],
        make: Callable[[UpstreamAddress], Upstream],
        usage_of: Callable[[str], LimitUsage],
        limits: Limits,
        estimate: Estimate,
        *,
        reads_queues: bool = False,
    ) -> None:
        self._make, self._usage_of = make, usage_of
        self._limits, self._estimate, self._reads_queues = limits, estimate, reads_queues
        # Those that have left stay until their last request has ended.
        self._known: dict[UpstreamAddress, Member] = {}
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self.all: tuple[Member, ...] = ()
        """Those that get requests."""
        self.replace(addresses)

    @property
    def in_flight(self) -> int:
        """The number of requests under way, of all processes, at those that have left as well."""
        return sum(member.load.in_flight for member in self._known.values())

    def replace(self, addresses: Iterable[UpstreamAddress]) -> None:
        """Have the upstreams at these addresses, and no others, get requests from now on.

        Where none of them is known to be ready, and others were, all are taken to be until a probe
        or a request tells: otherwise requests would be refused until the first probe.
        """
        was_ready = any(member.upstream.ready for member in self.all)
        self.all = tuple(map(self._member_at, dict.fromkeys(addresses)))
        self._changed.set()
        for member in [*self._known.values()]:
            member.has_left = member not in self.all
            if member.has_left:
                # It isn't probed any more; if it comes back, a probe tells.
                member.upstream.ready = False
            self._close_if_unused(member)
        if was_ready and not any(member.upstream.ready for member in self.all):
            for member in self.all:
                member.upstream.ready = True

    def set_limits(self, limits: Limits, timeout_s: float) -> None:
        """Let each have so many requests, and send nothing for so long, from now on."""
        self._limits = limits
        for member in self._known.values():
            member.load.limits = limits
            member.upstream.set_timeout(timeout_s)

    def begin(self, member: Member, tokens: float) -> bool:
        """Count a request, which `end` must follow; return false if it takes no more now."""
        return not member.has_left and member.load.begin(tokens)

    def end(self, member: Member, tokens: float) -> None:
        """Count the end of a request."""
        member.load.end(tokens)
        self._close_if_unused(member)

    async def watch(self) -> None:
        """Probe all of them, those that come later too, until cancelled."""
        watched: dict[Member, list[asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                for gone in watched.keys() - {*self.all}:
                    for task in watched.pop(gone):
                        task.cancel()
                for member in self.all:
                    if member not in watched:
                        watched[member] = [*map(group.create_task, self._watches(member))]
                await self._changed.wait()

    async def close(self) -> None:
        """Close all connections."""
        for member in [*self._known.values()]:
            await member.upstream.close()
        await asyncio.gather(*self._closing)

    def _watches(self, member: Member) -> Iterator[Coroutine[Any, Any, None]]:
        yield member.upstream.watch()
        if self._reads_queues:
            yield self._read_queue(member)

    async def _read_queue(self, member: Member) -> None:
        while True:
            await member.upstream.ready_event.wait()
            if len(self.all) > 1:
                member.load.note_requests(await member.upstream.count_requests())
            await asyncio.sleep(_READ_EVERY_S)

    def _member_at(self, address: UpstreamAddress) -> Member:
        member = self._known.get(address)
        if member is None:
            upstream = self._make(address)
            load = UpstreamLoad(self._usage_of(upstream.label), self._limits, self._estimate)
            self._known[address] = member = Member(address, upstream, load)
        return member

    def _close_if_unused(self, member: Member) -> None:
        if member.has_left and not member.load.active:
            del self._known[member.address]
            member.load.close()
            task = asyncio.create_task(member.upstream.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
