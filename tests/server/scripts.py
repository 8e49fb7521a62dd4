"""Scripts for `tests.server.sides`: what clients send, how it arrives, what happens between.

Questions and requests repeat often, so that most are hits, and known by their bytes.
"""

import gzip
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.server.conftest import CHAT
from tests.server.numbered_engine import FAILS, LONG, PRIVATE
from tests.server.sides import (
    BASE,
    KEYS,
    LAST_ETAG,
    ORIGIN,
    STALE,
    TENANTS,
    Leave,
    Purge,
    Reload,
    Send,
    Step,
)  # fmt: skip

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
STREAM = {"stream": True}
COUNTED = STREAM | {"stream_options": {"include_usage": True}}


_REPLACING = (b"no-cache", b"max-age=0", b"min-fresh=99999999")


class Asked(NamedTuple):
    """A whole request."""

    method: str
    path: str
    model: str
    data: bytes
    is_plain: bool
    """Whether it is as clients send it, and so valid HTTP."""

    @property
    def is_steady(self) -> bool:
        """Whether nothing goes on in the server after its response, and it replaces no answer.

        Of two generations of one answer at the same time, either may be stored last.
        """
        is_settled = self.path != RESPONSES and self.model not in ("sie", STALE)
        return is_settled and not any(word in self.data for word in _REPLACING)

    @property
    def expected(self) -> tuple[str, str, str]:
        return self[:3]


@dataclass
class Draft:
    """A request that options change."""

    path: str
    body: bytes
    method: str = "POST"
    target: str = ""
    version: str = "1.1"
    headers: list[tuple[str, str]] = field(default_factory=list)
    line_end: bytes = b"\r\n"
    before: bytes = b""
    chunk: int = 0
    """The size of its chunks; 0 for a body with a length."""

    def render(self, order: int) -> bytes:
        """Return its bytes; `order` decides order and case of the headers, 0 leaves them."""
        length = ("Transfer-Encoding", "chunked")
        body = self.body
        if self.chunk:
            starts = range(0, len(body), self.chunk)
            parts = [body[at : at + self.chunk] for at in starts]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])
        else:
            length = ("Content-Length", str(len(body)))
        headers = [("Host", "a"), *self.headers]
        if self.method == "POST":
            headers.append(length)
        else:
            # Without its body it would wait for one.
            headers = [each for each in headers if each[0] != "Content-Length"]
        if order:
            chance = random.Random(order)
            chance.shuffle(headers)
            case: Callable[[str], str] = chance.choice([str.lower, str.upper, str.title, str])
            headers = [(case(name), value) for name, value in headers]
        first = f"{self.method} {self.target or self.path} HTTP/{self.version}"
        lines = [first, *(f"{name}: {value}" for name, value in headers), "", ""]
        head = self.line_end.join(line.encode("latin-1") for line in lines)
        return self.before + head + (body if self.method == "POST" else b"")


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | more


EXPIRED = {"cache": {"ttl": 1e-6, "mode": "no-cache"}}
"""Replaces an answer by one that expires at once."""
USE = {"temperature": 1, "cache": {"mode": "use"}}
USUAL: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat("q0")),
    (CHAT, chat("q0", model="m", **STREAM)),
    (CHAT, chat("q1", **COUNTED)),
    (CHAT, chat("q1", cache={"tags": ["t1"]})),
    (COMPLETIONS, {"prompt": "q0", "temperature": 0}),
    (COMPLETIONS, {"prompt": "q0", "temperature": 0} | STREAM),
    (EMBEDDINGS, {"input": "q0"}),
    (MESSAGES, chat("q0", model="m", max_tokens=4)),
    (MESSAGES, chat("q0", model="m", max_tokens=4, **STREAM)),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat("q0", n=1, user="u")),
    (CHAT, chat("q0", model="alias")),
    (CHAT, chat("q0", request_id="given-in-body")),
    (CHAT, chat("q0") | EXPIRED),
    (CHAT, chat("q1") | EXPIRED),
    (CHAT, chat("q0", cache={"mode": "no-store"})),
    (CHAT, chat("q0", cache={"mode": "only-if-cached"})),
    (CHAT, chat("q2", cache={"ttl": 7200})),
    (CHAT, chat("q2", **COUNTED)),
    (CHAT, chat("q0", temperature=1)),
    (CHAT, chat("q0", seed=1)),
    (CHAT, chat("q0") | USE),
    (CHAT, chat("q0") | USE | {"cache": {"mode": "use", "variants": 3}}),
    (CHAT, chat("q0", tools=[{"type": "function", "function": {"name": "f"}}])),
    (CHAT, chat("q3" + "x" * 20_000)),
    (CHAT, chat(PRIVATE)),
    (CHAT, chat(LONG)),
    (CHAT, chat(LONG, **STREAM)),
    (CHAT, chat(FAILS)),
    (CHAT, chat("q0", model="n")),
    (CHAT, chat("q0", model="n", **STREAM)),
    (CHAT, chat("q0", model="swr")),
    (CHAT, chat("q0", model="sie")),
    (CHAT, chat(FAILS, model="sie")),
    (CHAT, chat("q0", model="unknown")),
    (CHAT, chat("q0", cache=5)),
    (CHAT, {}),
    (RESPONSES, {"input": "q0", "temperature": 0, "store": False}),
    (RESPONSES, {"input": "q0", "temperature": 0} | STREAM),
    ("/v1/messages/count_tokens", chat("q0", model="m")),
    ("/tokenize", {"prompt": "q0"}),
    ("/v1/others", {"a": 1}),
]

Option = Callable[[Draft], None]


def header(name: str, value: str) -> Option:
    return lambda draft: draft.headers.append((name, value))


def replaced(name: str, *values: str) -> Option:
    def replace(draft: Draft) -> None:
        draft.headers = [each for each in draft.headers if each[0] != name]
        draft.headers += [(name, value) for value in values]

    return replace


def having(**fields: Any) -> Option:
    def change(draft: Draft) -> None:
        for name, value in fields.items():
            setattr(draft, name, value)

    return change


def zipped(draft: Draft) -> None:
    draft.body = gzip.compress(draft.body, mtime=0)
    draft.headers.append(("Content-Encoding", "gzip"))


def kept_by_1_0(draft: Draft) -> None:
    draft.version = "1.0"
    draft.headers.append(("Connection", "keep-alive"))


def with_query(draft: Draft) -> None:
    draft.target = draft.path + "?a=1"


def with_escapes(draft: Draft) -> None:
    draft.target = draft.path.replace("v1", "%761")


def cut_short(draft: Draft) -> None:
    draft.body = draft.body[:-1]


_TYPE = "Content-Type"
_TRACE = "00-%032x-%016x-01"
OPTIONS: list[Option] = [
    header("X-Request-Id", "given"),
    header("X-Request-Id", "given-2"),
    header("X-Request-Id", "not an id!"),
    *(
        header("Cache-Control", value)
        for value in (
            "no-cache", "no-store", "max-age=0", "max-age=100000", "min-fresh=10",
            "min-fresh=99999999", "max-stale", "max-stale=100000", "only-if-cached",
            "max-age=0, only-if-cached", "no-transform",
        )
    ),
    header("If-None-Match", "*"),
    header("If-None-Match", LAST_ETAG.decode()),
    header("If-None-Match", 'W/"0"'),
    header("traceparent", _TRACE % (1, 1)),
    header("traceparent", _TRACE % (2, 2)),
    header("Origin", ORIGIN),
    header("Origin", "https://other.example"),
    header("Accept-Encoding", "gzip, deflate"),
    header("Accept", "text/event-stream"),
    header("Cookie", "a=b"),
    header("Expect", "100-continue"),
    header("Connection", "close"),
    header("Connection", "keep-alive"),
    header("Connection", "Keep-Alive, TE"),
    header("Content-Encoding", "identity"),
    header("Content-Encoding", "br"),
    header("OpenAI-Organization", "o1"),
    header("OpenAI-Organization", "o2"),
    header("Endpoint-Load-Metrics-Format", "json"),
    header("Host", "b"),
    header("Content-Length", "7"),
    header("X-Long", "x" * 9000),
    replaced(_TYPE, "application/json; charset=utf-8"),
    replaced(_TYPE, "APPLICATION/JSON"),
    replaced(_TYPE, "text/json"),
    replaced(_TYPE, "application/json", "text/plain"),
    replaced(_TYPE),
    having(version="1.0"),
    kept_by_1_0,
    having(chunk=1000),
    having(chunk=7),
    having(before=b"\r\n"),
    having(line_end=b"\n"),
    having(method="GET"),
    having(method="HEAD", path="/health"),
    having(method="GET", path="/v1/models"),
    having(method="OPTIONS"),
    zipped,
    with_query,
    with_escapes,
    cut_short,
]  # fmt: skip
_ALICE, _BOB = f"Bearer {KEYS['alice']}", f"Bearer {KEYS['bob']}"
_AUTH, _KEY = "Authorization", "x-api-key"
CREDENTIALS: list[list[tuple[str, str]]] = [
    [(_AUTH, f"Bearer {KEYS['carol']}")],
    [(_AUTH, f"bearer  {KEYS['alice']}")],
    [(_KEY, KEYS["alice"])],
    [(_AUTH, _ALICE), (_KEY, KEYS["bob"])],
    [(_AUTH, _ALICE), (_AUTH, _BOB)],
    [(_AUTH, f"Bearer {KEYS['nobody']}")],
    [(_AUTH, "Basic x")],
    [],
]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    """Most are usual requests of alice or bob."""
    rarely = st.sampled_from([False, False, False, True])
    path, body = draw(st.sampled_from(OTHERS if draw(rarely) else USUAL))
    made = Draft(
        path, json.dumps(body, separators=draw(st.sampled_from([(",", ":"), None]))).encode()
    )
    made.headers = [(_TYPE, "application/json")]
    if draw(rarely):
        made.headers += draw(st.sampled_from(CREDENTIALS))
    else:
        made.headers.append((_AUTH, _BOB if draw(rarely) else _ALICE))
    options = draw(
        st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=3) if draw(rarely) else st.just([])
    )
    for option in options:
        option(made)
    order = draw(st.integers(1, 1000)) if draw(rarely) else 0
    return Asked(made.method, made.path, body.get("model", "m"), made.render(order), not options)


def wrapped(inner: bytes) -> list[tuple[list[bytes], int]]:
    """Return requests that hold another one, in the pieces in which they are sent.

    The inner one is no request, and whoever takes it for one is wrong. With each, how many
    responses there are.
    """
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" % CHAT.encode()
    allowed = head + b"Authorization: %b\r\n" % _ALICE.encode()
    length = b"Content-Length: %d\r\n\r\n" % len(inner)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(inner)
    return [
        ([allowed + length, inner], 1),
        ([head + length, inner], 1),
        ([allowed + chunked, inner, b"\r\n0\r\n\r\n"], 1),
        ([b"POST /v1/embeddings HTTP/1.1\r\nX-A: ", inner], 1),
        ([b"GET /health HTTP/1.1\r\nHost: a\r\n" + length, inner], 1),
    ]


_number = itertools.count()
_EVENTS: list[Step] = [
    Purge("all", ""),
    *(Purge("key", number) for number in range(12)),
    Purge("tag", "t1"),
    *(Purge("model", name) for name in ("m", "n", "swr")),
    *(Purge("tenant", name) for name in ("alice", "bob")),
]
_RELOADS: list[Step] = [Reload(name) for name in TENANTS if name != BASE]
_KINDS = (
    *("send",) * 8, *("again",) * 16, *("split", "group", "haste", "hold", "wrap") * 2, "abort",
    "half-close", *("event",) * 3,
)  # fmt: skip


def _with_new_head(data: bytes) -> bytes:
    """Return a request with a header that no other has."""
    first, end, rest = data.partition(b"HTTP/1.")
    version, line_end, rest = rest.partition(b"\n")
    head = b"%b%b%b%b" % (first, end, version, line_end)
    return head + b"X-New: %012d\r\n" % next(_number) + rest


class _Script:
    """A script that is being written."""

    def __init__(self, draw: st.DrawFn, *, reloads: bool) -> None:
        self.steps: list[Step] = []
        self._draw = draw
        self._held: dict[int, Send] = {}
        self._reloads = reloads
        self._pool = draw(st.lists(requests(), min_size=1, max_size=3))
        self._asked = self._pool[0]

    def add(self, kind: str, connection: int) -> None:
        """Add a step, or several that belong together."""
        if kind in ("event", "reload"):
            self.steps.append(self._draw(st.sampled_from(_EVENTS if kind == "event" else _RELOADS)))
            return
        self.release(connection)
        self._asked = self._draw(st.sampled_from(self._pool))
        add: dict[str, Callable[[int], None]] = {
            "send": self._add_whole,
            "again": self._add_whole_again,
            "split": self._add_split,
            "group": self._add_group,
            "haste": self._add_haste,
            "hold": self._add_beginning,
            "wrap": self._add_wrapped,
            "abort": self._add_aborted,
            "half-close": self._add_last,
        }
        add[kind](connection)

    def _add_whole(self, connection: int) -> None:
        self.steps.append(Send(connection, self._asked.data, (self._asked.expected,)))

    def _add_whole_again(self, connection: int) -> None:
        for _ in range(self._draw(st.integers(2, 4))):
            self._add_whole(connection)

    def _add_split(self, connection: int) -> None:
        self._split(connection, self._asked.data, (self._asked.expected,))

    def _add_group(self, connection: int) -> None:
        """Add several requests at once, in one piece or in pieces that are none of them."""
        group = [each for each in self._group() if each.is_steady] or [self._asked]
        data = b"".join(each.data for each in group)
        self._split(connection, data, tuple(each.expected for each in group))

    def _add_haste(self, connection: int) -> None:
        """Add requests that each come while the one before is answered.

        That takes long where nothing is stored. How many come together is chance, so they are
        valid: aiohttp drops what came together with something that is invalid.
        """
        if self._draw(st.booleans()):
            self.steps.append(Purge("all", ""))
        group = [each for each in self._group() if each.is_steady and each.is_plain]
        for each in group[:-1]:
            self.steps.append(Send(connection, each.data, waits=False))
        for last in group[-1:]:
            expected = tuple(each.expected for each in group)
            self.steps.append(Send(connection, last.data, expected))

    def _group(self) -> list[Asked]:
        return self._draw(st.lists(st.sampled_from(self._pool), min_size=2, max_size=4))

    def _add_beginning(self, connection: int) -> None:
        # The server may wait a little for the rest of a request whose head it knows, before it
        # applies limits and keys to it.
        data = _with_new_head(self._asked.data) if self._reloads else self._asked.data
        at = self._cut(data)
        self.steps.append(Send(connection, data[:at]))
        self._held[connection] = Send(connection, data[at:], (self._asked.expected,))

    def _add_wrapped(self, connection: int) -> None:
        pieces, number = self._draw(st.sampled_from(wrapped(self._asked.data)))
        self.steps += [Send(connection, piece) for piece in pieces[:-1]]
        expected = (("POST", CHAT, self._asked.model),) * number
        self.steps.append(Send(connection, pieces[-1], expected))

    def _add_aborted(self, connection: int) -> None:
        # As above: a request isn't counted while the server waits.
        data = _with_new_head(self._asked.data)
        self.steps.append(Send(connection, data[: self._cut(data)]))
        self.steps.append(Leave(connection, self._draw(st.sampled_from(["reset", "close"]))))

    def _add_last(self, connection: int) -> None:
        """Add a request after which nothing comes; an engine might not end one that it answers."""
        if self._asked.is_steady and self._asked.is_plain:
            self._add_whole(connection)
            self.steps.append(Send(connection, self._asked.data, waits=False))
            self.steps.append(Leave(connection, "end"))

    def release(self, connection: int) -> None:
        """Send the rest of a request of which the beginning was sent."""
        if (held := self._held.pop(connection, None)) is not None:
            self.steps.append(held)

    def _split(self, connection: int, data: bytes, asked: tuple[tuple[str, str, str], ...]) -> None:
        cuts = sorted({self._cut(data) for _ in range(self._draw(st.integers(0, 3)))})
        starts = [0, *cuts]
        for start, end in zip(starts, cuts, strict=False):
            self.steps.append(Send(connection, data[start:end]))
        self.steps.append(Send(connection, data[starts[-1] :], asked))

    def _cut(self, data: bytes) -> int:
        """Return where to cut: anywhere, or where the body begins."""
        body = data.find(b"\r\n\r\n") + 4
        is_there = 4 <= body < len(data) and self._draw(st.booleans())
        return body if is_there else self._draw(st.integers(1, len(data) - 1))


class Script(tuple[Step, ...]):
    """Steps, of which a test that fails shows those that matter."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"a script of {len(self)} steps"


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """A script of 3 to 12 steps and what belongs to them, on one connection or two."""
    # After a reload everything has to be learned again.
    reloads = draw(st.sampled_from([False] * 12 + [True]))
    kinds = st.sampled_from([*_KINDS, *["reload"] * 4 * reloads])
    made = _Script(draw, reloads=reloads)
    most = draw(st.sampled_from([0, 0, 1]))
    for _ in range(draw(st.integers(3, 12))):
        made.add(draw(kinds), draw(st.integers(0, most)))
    for connection in (0, 1):
        made.release(connection)
    return Script(made.steps)
