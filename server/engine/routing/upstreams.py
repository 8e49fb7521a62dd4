"""The upstreams of one model as one: what is sent to them, and what is learnt of their replies."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

from server.auth.limits import Limits, LimitUsage, LocalUsage
from server.config.models import Routing
from server.engine.routing.addresses import Addresses, UpstreamAddress
from server.engine.routing.held import Demand, HeldRequests, NoEngineError
from server.engine.routing.load import Estimate
from server.engine.routing.members import Member, Members
from server.engine.routing.placement import Placement, Placing
from server.engine.routing.sending import ReplyT, Sender, Sent
from server.engine.turns import Turns
from server.engine.upstream import Upstream, may_be_sent_twice
from server.protocol.request import ParsedRequest
from server.protocol.usage import input_tokens_in, reused_tokens_in
from server.telemetry.spans import engine_request

logger = logging.getLogger(__name__)


class Upstreams:
    """The upstreams of one model.

    Args:
        addresses: of the engines' servers.
        make: returns the server at an address.
        max_requests: the requests that each of them may have at once; an engine queues what it
            can't run yet.
        turns: of the event loop, for the work on requests and replies.
        usage_of: returns what counts the requests at the upstream of that name; by default those
            of this process.
        reads_queues: whether they say how many requests they have, as vLLM does.
        routing: how one is chosen.
        key: of digests of prompts; the same in all processes.
        held: the requests that find none of them ready.
    """

    def __init__(
        self,
        addresses: Addresses,
        make: Callable[[UpstreamAddress], Upstream],
        *,
        max_requests: int,
        turns: Turns,
        usage_of: Callable[[str], LimitUsage] = lambda _: LocalUsage(),
        reads_queues: bool = False,
        routing: Routing = "prefix",
        key: bytes = b"",
        held: HeldRequests | None = None,
    ) -> None:
        self._turns, self._estimate, self._addresses = turns, Estimate(), addresses
        self.held = HeldRequests() if held is None else held
        """The requests that find none of them ready."""

        def make_announcing(address: UpstreamAddress) -> Upstream:
            upstream = make(address)
            upstream.on_ready = self.held.go_on
            return upstream

        limits = Limits(max_requests=max_requests)
        self._members = Members(
            addresses.all,
            make_announcing,
            usage_of,
            limits,
            self._estimate,
            reads_queues=reads_queues and routing != "round_robin",
        )
        self._placing = Placing(self._estimate, routing, key)
        self._sender = Sender(self._members)
        # How those requests were sent whose replies are read.
        self._sent: WeakKeyDictionary[object, Sent] = WeakKeyDictionary()

    @property
    def all(self) -> tuple[Upstream, ...]:
        """Those that get requests now."""
        return tuple(member.upstream for member in self._members.all)

    @property
    def members(self) -> tuple[Member, ...]:
        """The same, with what each has to do."""
        return self._members.all

    @property
    def in_flight(self) -> int:
        """The number of requests at the upstreams now, of all processes that share the usages."""
        return self._members.in_flight

    def replace(self, urls: Iterable[str]) -> None:
        """Have those that the configuration names so, and no others, get requests from now on.

        One that stays keeps its state. Requests under way at one that leaves end undisturbed. Where
        nothing is known but names, the others stay until these have been looked up.
        """
        self._addresses.use(urls)
        self._take_addresses()

    def _take_addresses(self) -> None:
        if found := self._addresses.all:
            self._members.replace(found)

    def follow(self, addresses: Iterable[UpstreamAddress]) -> None:
        """Take over the addresses that another process has found."""
        self._members.replace(addresses)

    def set_limits(self, max_requests: int, timeout_s: float) -> None:
        """Let each have so many requests, and send nothing for so long, from now on."""
        self._members.set_limits(Limits(max_requests=max_requests), timeout_s)
        self.held.set_max_requests(max_requests)

    async def watch(self) -> None:
        """Look names up again, and probe all upstreams that are there, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._members.watch())
            group.create_task(self._addresses.follow(self._take_addresses))

    @property
    def ready(self) -> bool:
        """Whether any upstream is ready."""
        return any(upstream.ready for upstream in self.all)

    @property
    def loading(self) -> bool:
        """Whether any upstream is a tierserve whose engine isn't ready."""
        return any(upstream.loading for upstream in self.all)

    def request(
        self,
        method: str,
        path: str,
        *,
        data: Any,
        headers: Mapping[str, str],
        repeatable: bool = False,
        asked: ParsedRequest | None = None,
        kept_id: str | None = None,
        demand: Demand = "none",
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a request to the upstream that is to answer it; gives its reply.

        One that takes no connection is passed over. What may be sent twice goes on to another, too,
        if one says before its answer that it has too much to do or doesn't work.

        Args:
            method: of the request.
            path: may have a query.
            data: the body.
            headers: of the request.
            repeatable: whether it has no effect but its reply, so that it may be sent twice.
            asked: the same request, parsed, if it was.
            kept_id: the id of an answer that one of the upstreams keeps, and that the request is
                about. One that doesn't know it has no answer (404), and another is asked.
            demand: what happens to it while there is no engine.

        Raises:
            UnavailableError: no upstream is ready, or they have `max_requests`.
            aiohttp.ClientError: the upstream failed.
        """
        return self._open(
            method,
            headers,
            lambda: self._placing.place(self._members.all, headers, asked, kept_id),
            lambda upstream, headers: upstream.request(
                method, path, data, headers, repeatable=repeatable
            ),
            may_go_on=may_be_sent_twice(method, data, repeatable=repeatable),
            demand=demand,
        )

    def websocket(
        self, path: str, headers: Mapping[str, str], protocols: Sequence[str], *, max_bytes: int
    ) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """Open a WebSocket to the upstream that is to have it.

        Args:
            path: may have a query.
            headers: of its handshake.
            protocols: offered to the upstream.
            max_bytes: of one message.

        Raises:
            UnavailableError: no upstream is ready, or they have `max_requests`.
            aiohttp.ClientError: the upstream failed or refused.
        """
        return self._open(
            "GET",
            headers,
            lambda: self._placing.place(self._members.all, headers, None, None),
            lambda upstream, headers: upstream.unpooled.ws_connect(
                upstream.url_of(path),
                headers=upstream.with_credentials(headers),
                protocols=protocols,
                max_msg_size=max_bytes,
            ),
            may_go_on=False,
            demand="held",
        )

    async def pieces(self, reply: aiohttp.ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
        """Yield a reply's body as it comes, in pieces of at most `max_bytes`, each in its turn."""
        async for piece in reply.content.iter_any():
            for at in range(0, len(piece), max_bytes):
                await self._turns.take()
                yield piece[at : at + max_bytes]

    def note_counts(self, reply: aiohttp.ClientResponse, counts: bytes) -> None:
        """Learn from the end of an answer, which may have token counts."""
        sent, prompt_tokens = self._sent[reply], input_tokens_in(counts)
        if prompt_tokens is None:
            return
        member, placement, cached_tokens = sent.member, sent.placement, reused_tokens_in(counts)
        # Another than the first need not have seen its beginning.
        known = placement.known if member is placement.order[0] else 0
        self._estimate.learn(placement.size, known, prompt_tokens, cached_tokens)
        counted = member.load.counts
        counted.prompt_tokens += prompt_tokens
        counted.cached_tokens += cached_tokens or 0

    async def keeps_generating(
        self, reply: aiohttp.ClientResponse, *, model: str, headers: Mapping[str, str]
    ) -> bool:
        """Whether the engine that gave a reply has not begun to stop since the request was sent.

        Args:
            reply: has been read to its end.
            model: by the engine's name.
            headers: of the request.
        """
        sent = self._sent[reply]
        # One that has left may be about to stop.
        keeps = not sent.member.has_left and await sent.member.upstream.keeps_generating(
            since=sent.at, model=model, headers=headers
        )
        if not keeps:
            logger.info("an answer is not stored: its engine may have been stopped meanwhile")
        return keeps

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        headers: Mapping[str, str],
        place: Callable[[], Placement],
        send: Callable[[Upstream, Mapping[str, str]], Awaitable[ReplyT]],
        *,
        may_go_on: bool,
        demand: Demand,
    ) -> AsyncIterator[ReplyT]:
        """Give the reply of the upstream that answers, count it as in flight, and close it."""
        with engine_request(method) as traced:
            headers = traced.inject(headers)
            sent, reply = await self._send_once_ready(
                place, lambda each: send(each, headers), may_go_on=may_go_on, demand=demand
            )
            self._sent[reply] = sent
            try:
                async with reply:
                    if isinstance(reply, aiohttp.ClientResponse):
                        traced.set_reply(reply.status, reply.url.host, reply.url.port)
                    await self._turns.take()
                    yield reply
            finally:
                self._sender.end(sent)

    async def _send_once_ready(
        self,
        place: Callable[[], Placement],
        send: Callable[[Upstream], Awaitable[ReplyT]],
        *,
        may_go_on: bool,
        demand: Demand,
    ) -> tuple[Sent, ReplyT]:
        """Send a request; one that may be held until there is an engine is."""
        until = None
        while True:
            await self._turns.take()
            try:
                return await self._sender.send(place(), send, may_go_on=may_go_on)
            except NoEngineError:
                if until is None and demand != "none":
                    until = self.held.count()
                if until is None or demand != "held":
                    raise
                await self.held.wait(until, is_there=self.ready)

    async def close(self) -> None:
        """Close all connections."""
        await self._members.close()
