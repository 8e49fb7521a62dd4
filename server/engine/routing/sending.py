"""Sending a request to one upstream after the other, until one answers it.

Invariants: a request is counted at its upstream before it is sent, until its reply is closed; a
request that may have had an effect is never sent to a second upstream.
"""

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import aiohttp

from server.engine.routing.held import NoEngineError
from server.engine.routing.members import Member, Members
from server.engine.routing.placement import Placement
from server.engine.upstream import UnavailableError, Upstream

# With these an upstream, or what stands before it, says that another one might answer.
_PASSED_ON = frozenset({429, 502, 503})
_MOST_ASKED = 3
"""How many upstreams one request is sent to, where they answer so."""
_BROKEN = aiohttp.ServerDisconnectedError, aiohttp.ClientOSError
_NOT_FOUND = 404
_FULL = "The engine has as many requests as it takes; try again."
ReplyT = TypeVar("ReplyT", aiohttp.ClientResponse, aiohttp.ClientWebSocketResponse)
"""What an upstream answers."""


class Sent(NamedTuple):
    """A request that an upstream has begun to answer."""

    member: Member
    placement: Placement
    at: float
    """When it was sent (monotonic s)."""


class Sender:
    """Sends requests to the upstreams of one model.

    Args:
        members: the upstreams, which count what they have under way.
    """

    def __init__(self, members: Members) -> None:
        self._members = members

    async def send(
        self,
        placement: Placement,
        send: Callable[[Upstream], Awaitable[ReplyT]],
        *,
        may_go_on: bool,
    ) -> tuple[Sent, ReplyT]:
        """Send a request until an upstream answers it; `end` must follow.

        Args:
            placement: where it may be sent.
            send: sends it to one.
            may_go_on: whether it may be sent to another after one that had too much to do, didn't
                work, or broke before it answered.

        Raises:
            NoEngineError: none takes a connection.
            UnavailableError: they have as many requests as they take, or the answer that the
                request is about may be kept by one that can't say so.
            aiohttp.ClientError, OSError: the upstream failed.
        """
        has_room = is_missing = False
        times = missing = 0
        # The last reply, until it is given or another is asked for.
        last: tuple[Sent, ReplyT] | None = None
        broken: list[Exception] = []
        try:
            for member in placement.order:
                if not self._members.begin(member, placement.tokens):
                    continue
                has_room = True
                answered = await self._ask(member, placement, send, broken if may_go_on else None)
                if answered is None:
                    continue
                if last is not None:
                    self._drop(*last)
                last, status = answered, _status_of(answered[1])
                is_missing = placement.is_of_kept and status == _NOT_FOUND
                times, missing = times + 1, missing + is_missing
                is_refused = may_go_on and status in _PASSED_ON and times < _MOST_ASKED
                if not (is_missing or is_refused):
                    break
            if last is None:
                raise _failure(broken, has_room=has_room)
            sent, reply = last
            if is_missing and missing < len(self._members.all):
                # One that wasn't asked, or has answered otherwise, may keep it.
                raise UnavailableError
            if placement.is_overflow and sent.member is placement.order[0]:
                sent.member.load.counts.overflow += 1
            last = None
            return sent, reply
        finally:
            if last is not None:
                self._drop(*last)

    def end(self, sent: Sent) -> None:
        """Count the end of a request whose reply is closed."""
        self._members.end(sent.member, sent.placement.tokens)

    async def _ask(
        self,
        member: Member,
        placement: Placement,
        send: Callable[[Upstream], Awaitable[ReplyT]],
        broken: list[Exception] | None,
    ) -> tuple[Sent, ReplyT] | None:
        """Send a request that is counted; returns nothing if another upstream may get it now.

        Args:
            member: the upstream.
            placement: where it may be sent.
            send: sends it.
            broken: gets the failure of a connection that broke; `None` if the request isn't sent
                again after one.
        """
        sent = Sent(member, placement, time.monotonic())
        try:
            return sent, await send(member.upstream)
        except BaseException as exc:
            self.end(sent)
            if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                # Nothing was sent, so another may get it.
                member.upstream.mark_unreachable(exc)
                return None
            # Once only: what ends one engine must not end all of them.
            if broken == [] and isinstance(exc, _BROKEN):
                broken.append(exc)
                return None
            raise

    def _drop(self, sent: Sent, reply: ReplyT) -> None:
        """Close a reply that nobody gets; its upstream doesn't go on with the request."""
        self.end(sent)
        if isinstance(reply, aiohttp.ClientResponse):
            reply.close()


def _failure(broken: list[Exception], *, has_room: bool) -> Exception:
    """Return why no upstream has answered."""
    if broken:
        return broken[0]
    return NoEngineError() if has_room else UnavailableError(_FULL)


def _status_of(reply: aiohttp.ClientResponse | aiohttp.ClientWebSocketResponse) -> int | None:
    """Return the status of a reply; `None` for a WebSocket, which is open."""
    return reply.status if isinstance(reply, aiohttp.ClientResponse) else None
