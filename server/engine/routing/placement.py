"""Where a request is sent: the order in which upstreams are tried, and what it costs them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from server.config.models import Routing
from server.engine.routing.beginnings import (
    NO_BEGINNINGS,
    PromptBeginnings,
    beginnings_of,
    digest_of,
    session_in,
)
from server.engine.routing.choice import Beginnings, Choice, Rotation, by_load, within_bound
from server.engine.routing.held import NoEngineError
from server.engine.routing.load import Estimate
from server.engine.routing.members import Member
from server.protocol.request import ParsedRequest


class Placement(NamedTuple):
    """Which upstreams a request may be sent to, and what it costs."""

    order: Sequence[Member]
    """The first is to answer it."""
    is_overflow: bool
    """Whether the first is none of those that its beginning prefers: they have too much to do."""
    is_of_kept: bool
    """Whether it is about an answer that one upstream keeps."""
    size: int
    """Bytes of its body."""
    known: int
    """Of these, at its beginning, those that the first upstream has seen."""
    tokens: float
    """That an upstream computes for it."""


class Placing:
    """Places the requests to the upstreams of one model.

    Args:
        estimate: of the model's prompts.
        routing: how an upstream is chosen.
        key: of digests of prompts; the same in all processes.
    """

    def __init__(self, estimate: Estimate, routing: Routing, key: bytes) -> None:
        self._estimate, self._routing, self._key = estimate, routing, key
        self._beginnings = Beginnings()
        self._rotation = Rotation()

    def place(
        self,
        members: Sequence[Member],
        headers: Mapping[str, str],
        asked: ParsedRequest | None,
        kept_id: str | None,
    ) -> Placement:
        """Return where a request may be sent.

        Args:
            members: the upstreams.
            headers: of the request.
            asked: the request, parsed, if it was.
            kept_id: the id of an answer that one upstream keeps, if the request is about one.

        Raises:
            NoEngineError: no upstream is ready.
        """
        takers = _takers(members)
        if not takers:
            raise NoEngineError
        upstreams = [member.upstream for member in members]
        names = [upstream.label for upstream in upstreams]
        size = 0 if asked is None else len(asked.raw)
        known = 0
        if kept_id is not None:
            # All processes ask the same one first. Neither load nor failures count: one knows it.
            order = self._beginnings.prefer([digest_of(kept_id, self._key)], names).order
            choice = Choice([number for number in order if upstreams[number].ready] or takers)
        elif self._routing == "round_robin":
            choice = Choice(self._rotation.next(takers))
        else:
            loads = [member.load.tokens for member in members]
            begun = self._beginnings_of(headers, asked, len(members))
            if begun.digests:
                preference = self._beginnings.prefer(begun.digests, names)
                seen = self._beginnings.count(begun.digests)
                known = begun.ends[seen - 1] if seen and begun.ends else 0
                tokens = self._estimate.tokens_in(size)
                choice = within_bound(preference, takers, loads, tokens)
                if choice.is_overflow:
                    known = 0
            else:
                choice = Choice(by_load(self._rotation.next(takers), loads))
        return Placement(
            [members[number] for number in choice.order],
            choice.is_overflow,
            kept_id is not None,
            size,
            known,
            self._estimate.tokens(size, known),
        )

    def _beginnings_of(
        self, headers: Mapping[str, str], asked: ParsedRequest | None, upstreams: int
    ) -> PromptBeginnings:
        if self._routing != "prefix" or upstreams == 1:
            return NO_BEGINNINGS
        if asked is None:
            return session_in(headers, self._key)
        return beginnings_of(asked, headers, self._key)


def _takers(members: Sequence[Member]) -> Sequence[int]:
    """Return the numbers of the upstreams that may get requests."""
    ready = [number for number, member in enumerate(members) if member.upstream.ready]
    takers = [number for number in ready if members[number].upstream.takes_requests]
    # Where most fail again and again, the cause isn't theirs, and the others can't do it all.
    if 2 * len(takers) < len(ready):
        return ready
    return takers or [number for number, member in enumerate(members) if member.upstream.loading]
