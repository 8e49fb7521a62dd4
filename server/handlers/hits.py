"""Hits that need nothing but a lookup: the bodies of their requests are known.

What a body and the headers that matter mean is remembered by their digest, so it is parsed once.
Two ways lead here, and both get what `server.handlers.cached` would answer: a request that aiohttp
has parsed (`answer`), and one that is known by its bytes (`server.web.known_requests`). Whatever
else there is to do is left to `server.handlers.cached`, which then finds everything as it was.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import floor
from time import perf_counter
from typing import Any

from aiohttp import hdrs
from multidict import istr

from server.auth.tenant import Tenant
from server.auth.tenants import Tenants
from server.handlers.rendering import content_type_of
from server.protocol import template
from server.protocol.formats import CREATED, ID
from server.protocol.model_names import ModelNames
from server.protocol.request import ParsedRequest, key_headers
from server.protocol.usage import output_tokens
from server.telemetry.finished import FinishedRequests
from server.telemetry.served import Served
from server.web.request import X_REQUEST_ID, HttpRequest, Reply
from server.web.responses import (
    PrebuiltResponse,
    lines_of,
    more_lines,
    second,
    whole_head,
)
from tiers import Answer, Hit
from tiers.answer_cache import AnswerCache
from tiers.encryption import Fingerprint
from tiers.entry import Entry

# Of about a kilobyte each.
_MAX_BODIES = 8192
_TRACEPARENT = istr("traceparent")
_MAX_ALL_CUT_BYTES = 64 * 1024**2
_MAX_CUT_BYTES = 256 * 1024
_RENDITION_BYTES = 1024
# A longer answer goes out in pieces, as its client reads them.
_MAX_KNOWN_ANSWER_BYTES = 256 * 1024
# `NamedTuple`'s own way to make a tuple would be a call more for each hit.
_new = tuple.__new__


class _KnownBody:
    """What a body asks for, as far as a hit needs it.

    Args:
        names: those by which it was parsed.
        request: what it means.
    """

    __slots__ = (
        "content_type",
        "done",
        "encoding",
        "id_prefix",
        "key",
        "model",
        "names",
        "path",
        "rendition",
        "wants_usage",
    )

    def __init__(self, names: ModelNames, request: ParsedRequest) -> None:
        self.names, self.path, self.model = names, request.path, request.model
        self.key, self.encoding = request.key, request.encoding
        self.wants_usage, self.id_prefix = request.wants_usage, request.route.id_prefix
        self.done = request.route.format.done
        self.content_type = content_type_of(request.encoding)
        self.rendition: _Rendition | None = None
        """Of the entry that answered it last."""


class _Rendition:
    """What all responses with one entry to one body have in common.

    Args:
        known: the body.
        entry: the entry.
    """

    __slots__ = ("_entry", "_etag", "_first", "_marks_between", "_rest_bytes", "pieces", "tokens")

    def __init__(self, known: _KnownBody, entry: Entry) -> None:
        # Not the entry itself, which is the memory tier's to keep.
        self._entry = (len(entry.answer.content), *entry[1:])
        self._etag = template.etag(entry.answer, wants_usage=known.wants_usage)
        self._first, self._marks_between, self._rest_bytes = b"", b"", 0
        self.tokens = output_tokens(entry.answer) or 0
        self.pieces: list[bytes] | None = None
        """What stands around the marks of its body or stream; empty if they aren't alike."""

    def is_of(self, entry: Entry) -> bool:
        """Return whether it is of this entry: no other has its times to the microsecond."""
        return self._entry == (len(entry.answer.content), *entry[1:])

    def cut(self, known: _KnownBody, answer: Answer) -> None:
        """Cut the body or stream at its marks, if it has the same between each id and time."""
        whole = template.whole(answer, wants_usage=known.wants_usage, done=known.done)
        between, has_time, _ = whole.partition(ID)[2].partition(CREATED)
        pieces = whole.split(ID + between + CREATED)
        marks = len(pieces) - 1
        self.pieces = []
        if has_time and marks == whole.count(ID) == whole.count(CREATED):
            self.pieces, self._first, self._marks_between = pieces, pieces[0], between
            self._rest_bytes = sum(map(len, pieces)) + marks * len(between)

    def render(self, known: _KnownBody, hit: Hit, id_: str, now: float, more: str) -> bytes:
        """Return the response with a hit, as it is sent."""
        entry, id_in_body = hit.entry, (known.id_prefix + id_).encode()
        created, _ = second(int(now))
        if pieces := self.pieces:
            size = self._rest_bytes + (len(pieces) - 1) * (len(id_in_body) + len(created))
        else:
            body = template.render(
                entry.answer,
                id_in_body,
                int(now),
                wants_usage=known.wants_usage,
                done=known.done,
            )
            size = len(body)
        # Another machine's clock may be a little ahead.
        seen = max(now, entry.stored_at)
        ttl_s, age_s = floor(entry.expires_at - seen), int(seen - entry.stored_at)
        status = f"tierserve; hit; ttl={ttl_s}; detail={hit.tier}"
        head = whole_head(known.content_type, status, age_s, self._etag, id_, now, size, more)
        if not pieces:
            return head + body
        # In place, since a long stream has hundreds of them.
        pieces[0] = head + self._first
        return (id_in_body + self._marks_between + created).join(pieces)


class Hits:
    """Answers requests whose bodies are known.

    Args:
        answers: finds the entries.
        names: returns the models' names as they are now.
        tenants: know which tenants are current.
        ids: yields ids of requests.
        finished: is given the requests that nobody else sees.
        remembers: whether requests are known by their bytes, too.
    """

    def __init__(
        self,
        answers: AnswerCache,
        names: Callable[[], ModelNames],
        tenants: Tenants,
        ids: Iterator[str],
        finished: FinishedRequests,
        *,
        remembers: bool,
    ) -> None:
        self._find, self._clock = answers.find_at_once, answers.chain.clock
        self._names, self._tenants = names, tenants
        self._ids, self._finished, self._remembers = ids, finished, remembers
        self._digest = Fingerprint().of
        self._bodies: OrderedDict[Any, _KnownBody] = OrderedDict()
        self._learned_from: ModelNames | None = None
        # Those that were cut since all were dropped, and their size.
        self._are_cut: list[_Rendition] = []
        self._cut_bytes = 0

    def learn(
        self, http: HttpRequest, body: bytes, names: ModelNames, request: ParsedRequest
    ) -> None:
        """Remember what a body means that a lookup alone has answered.

        Args:
            http: the request.
            body: its body.
            names: those by which it was parsed.
            request: what it means.
        """
        if (at := self._place_of(http, body, names)) is None:
            return
        if names is not self._learned_from:
            self._bodies.clear()
            self._learned_from = names
        self._bodies[at] = _KnownBody(names, request)
        if len(self._bodies) > _MAX_BODIES:
            self._bodies.popitem(last=False)

    def answer(self, http: HttpRequest, body: bytes) -> Reply | None:
        """Return the hit that answers a request, if its body is known and nothing else is to do."""
        names = self._names()
        at = self._place_of(http, body, names)
        known = None if at is None else self._bodies.get(at)
        if known is None or known.names is not names:
            return None
        now = self._clock()
        if (hit := self._find(known.key, known.encoding, now)) is None:
            return None
        self._bodies.move_to_end(at)
        whole, served = self._render(known, hit, http.id, now, more_lines(http))
        # With an id of its own it won't come again.
        has_id = X_REQUEST_ID in http.headers or _TRACEPARENT in http.headers
        if self._remembers and not has_id and len(whole) <= _MAX_KNOWN_ANSWER_BYTES:
            http.remember(body, partial(self.answer_known, known, http.tenant, http.cors_headers))
        return PrebuiltResponse(http, whole), served

    def answer_known(
        self, known: _KnownBody, tenant: Tenant, cors_headers: Mapping[str, str]
    ) -> bytes | None:
        """Return the response to a request that is known by its bytes, as `answer` would give it.

        `None` says that it has to be parsed again, which hasn't been anticipated in anything.
        """
        started = perf_counter()
        if known.names is not self._names() or not self._tenants.is_current(tenant):
            return None
        limiter = tenant.limiter
        if limiter is not None and limiter.check() is not None:
            return None
        now = self._clock()
        if (hit := self._find(known.key, known.encoding, now)) is None:
            return None
        name, headers = None, cors_headers
        if limiter is not None:
            # Another process may have taken what was left since; this one more was begun in time.
            is_counted = limiter.acquire() is None
            name, limits = tenant.name, limiter.headers
            headers = {**headers, **limits} if limits else headers
            if is_counted:
                limiter.release()
        id_ = next(self._ids)
        whole, served = self._render(known, hit, id_, now, lines_of(headers) if headers else "")
        seconds = perf_counter() - started
        self._finished.add("POST", known.path, id_, name, 200, seconds, served)
        return whole

    def _render(
        self, known: _KnownBody, hit: Hit, id_: str, now: float, more: str
    ) -> tuple[bytes, Served]:
        """Return the response with a hit, as it is sent, and the record of it."""
        entry, rendition = hit.entry, known.rendition
        if rendition is None or not rendition.is_of(entry):
            rendition = known.rendition = _Rendition(known, entry)
        elif rendition.pieces is None:
            self._cut(known, rendition, entry.answer)
        whole = rendition.render(known, hit, id_, now, more)
        served = (
            hit.tier,
            "hit",
            known.model,
            known.key,
            entry.answer,
            entry.generation_s,
            rendition.tokens,
            "",
        )
        return whole, _new(Served, served)

    def _cut(self, known: _KnownBody, rendition: _Rendition, answer: Answer) -> None:
        """Cut an answer at its marks, unless it is too long."""
        size = len(answer.content) + _RENDITION_BYTES
        if size > _MAX_CUT_BYTES:
            return
        if self._cut_bytes + size > _MAX_ALL_CUT_BYTES:
            # Begin anew: those that are asked for are soon there again.
            for each in self._are_cut:
                each.pieces = None
            self._are_cut.clear()
            self._cut_bytes = 0
        rendition.cut(known, answer)
        self._are_cut.append(rendition)
        self._cut_bytes += size

    def _place_of(
        self, http: HttpRequest, body: bytes, names: ModelNames
    ) -> tuple[object, ...] | None:
        """Return under what a body is remembered; `None` if its headers ask for more."""
        headers = http.headers
        if hdrs.CACHE_CONTROL in headers or hdrs.IF_NONE_MATCH in headers:
            return None
        media, others = headers.get(hdrs.CONTENT_TYPE), None
        if not names.are_vllm:
            others = key_headers(headers)
        # The tenant itself, since one of the same name may have other rights later.
        return self._digest(body), http.raw_path, http.tenant, media, others
