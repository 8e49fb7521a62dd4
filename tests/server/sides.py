"""Two servers that are sent the same bytes, and what must be the same in what they send back.

Each side is a server in front of an engine of its own. A script is a list of steps: bytes on
connections, and events between them. What differs by nature is checked by itself and then replaced:
ids, which are new and never repeated, dates, and times, which agree with those of each entry.
"""

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson
from hypothesis import HealthCheck, Phase, settings

from server.config.secrets import hash_key, new_key
from tests.server.conftest import Front, alike
from tests.server.numbered_engine import NumberedEngine
from tests.server.raw_client import RawConnection, Reply
from tests.waiting import HANGS_S

LONG = os.environ.get("TIERSERVE_LONG") == "1"
KEYS = {name: new_key() for name in ("alice", "bob", "carol", "nobody")}
BASE = "base"
_TEAM = {name: {"keys": [hash_key(KEYS[name])], "scope": "team"} for name in ("alice", "bob")}
_CAROL = {"carol": {"keys": [hash_key(KEYS["carol"])], "operator": True}}
_BOB = _TEAM["bob"]
_BOTH = [*_TEAM["alice"]["keys"], *_BOB["keys"]]
TENANTS: dict[str, dict[str, dict[str, Any]]] = {
    BASE: _TEAM | _CAROL,
    "bob has no key": _TEAM | _CAROL | {"bob": _BOB | {"keys": []}},
    "bob asks twice a minute": _TEAM | _CAROL | {"bob": _BOB | {"requests_per_minute": 2}},
    "bob asks thrice a minute": _TEAM | _CAROL | {"bob": _BOB | {"requests_per_minute": 3}},
    "alice asks one at once": _TEAM | _CAROL | {"alice": _TEAM["alice"] | {"max_requests": 1}},
    "bob is alone": _TEAM | _CAROL | {"bob": {"keys": _BOB["keys"]}},
    "bob's key is alice's": _CAROL | {"alice": {"keys": _BOTH, "scope": "team"}, "bob": {}},
    "nobody may": {"dave": {}},
}
"""What the file of tenants may hold, by name."""
ORIGIN = "https://app.example"
LAST_ETAG = b'W/"LAST-ETAG-OF-ALL"'
"""Stands in a request for the ETag that came last."""
STALE = "swr"
"""The model whose answers are stale at once, and refreshed by each hit."""
TTL_S = 3600
_PROBE = b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: probe\r\n\r\n"
_created = re.compile(rb'"created(?:_at)?": ?(\d{9,})')
_ttl = re.compile(r"ttl=(-?\d+)")
# How long things took, and what depends on when the disk tier's thread drops what has expired.
_timed = re.compile(
    "tierserve_(request_seconds_(bucket|sum)|saved_seconds|config_last_reload_success_timestamp"
    '|tier_(entries|bytes|expirations_total){tier="disk"})'
)
_upstream = re.compile(',upstream="[^"]*"')
_own = re.compile(r'tierserve_request(s_total|_seconds_count)\{model="",outcome="own"').match
_AT_ONCE = "tierserve_known_requests_total"
_CONTROL = "control"
_OURS = f"Host: a\r\nX-Request-Id: {_CONTROL}\r\n"
"""In requests of this module."""


class Send(NamedTuple):
    """Bytes on a connection, which is opened if it isn't open."""

    connection: int
    data: bytes
    asked: tuple[tuple[str, str, str], ...] = ()
    """Method, path and model of each request whose response is awaited then."""
    waits: bool = True
    """Whether what was sent is read before what is sent then, where no response is awaited."""


class Leave(NamedTuple):
    """The client's end of a connection."""

    connection: int
    how: str
    """`reset`, `close`, or `end`, a half-close after which the server's last bytes are read; a
    `half-close` first waits until the server has done what it can."""


class Purge(NamedTuple):
    """A purge through the admin socket."""

    kind: str
    name: str | int
    """Of keys, the place among those in memory."""


class Reload(NamedTuple):
    """Another file of tenants, which holds when the step ends."""

    name: str


Step = Send | Leave | Purge | Reload


class Side:
    """One of the servers, and the engine behind it.

    Args:
        folder: for its files.
        sections: merged into its configuration.
        padding: bytes of each answer.
        tiers: its tiers.
    """

    def __init__(
        self, folder: Path, sections: dict[str, dict[str, Any]], padding: int, **tiers: Any
    ) -> None:
        folder.mkdir()
        self.folder, self.engine = folder, NumberedEngine(padding)
        self._tenants, self._marks = BASE, 0
        self._has_memory = tiers.get("memory", {}) is not None
        self._write_tenants(BASE)
        models = alike(self.engine.url)
        models["m"] |= {"aliases": ["alias"]}
        made = {
            "tenants": {"file": "tenants.json", "open_metrics": True},
            "cache": {"ttl_s": TTL_S, "ttl_jitter": 0},
            "log": {"trace": "trace.jsonl"},
        }
        for name, section in sections.items():
            made[name] = made.get(name, {}) | section
        made["server"] = {"allowed_origins": [ORIGIN]} | made.get("server", {})
        if tiers["disk"] is not None:
            tiers["disk"] = tiers["disk"] | {"path": str(folder / "disk")}
        self.front = Front(folder, models, sections=made, **tiers)
        self.outcomes: Counter[str] = Counter()
        """Of the responses: their `Cache-Status` without numbers."""
        self.answered_at_once = 0
        """How many known requests the server has answered at once, when metrics were read."""
        self._ids: set[str] = set()
        self._stored: dict[str, tuple[float, float]] = {}
        self._last_etag = LAST_ETAG
        self._own = 0

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(self.engine)
        await self._stack.enter_async_context(self.front)
        self._control, self._admin = (
            RawConnection(self.front.port), RawConnection(self.front.socket),
        )  # fmt: skip
        for each in (self._control, self._admin):
            await each.open()
            self._stack.callback(each.close)
        # It was asked whether it is ready until it was.
        metrics = await self.metrics()
        self._own += int(next(value for name, value in metrics.items() if _own(name)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, exc, at)

    async def play(self, script: Sequence[Step]) -> list[Any]:
        """Return what the server sent, step by step, and how each connection ended."""
        said: list[Any] = []
        try:
            async with asyncio.timeout(HANGS_S):
                await self._play(script, said)
        except TimeoutError as exc:
            steps = "\n".join(map(str, script[: len(said) + 1]))
            raise AssertionError(f"the last of these steps hangs:\n{steps}\n{said}") from exc
        return said

    async def _play(self, script: Sequence[Step], said: list[Any]) -> None:
        open_: dict[int, RawConnection] = {}
        # Not at once: what came before a step that hangs is shown.
        for step in script:
            said += [await self._take(step, open_)]
        for number in sorted(open_):
            said += [await self._end(open_[number])]
        if self._tenants != BASE:
            await self._reload(BASE)

    async def _take(self, step: Step, open_: dict[int, RawConnection]) -> Any:
        if isinstance(step, Purge):
            return await self._purge(step)
        if isinstance(step, Reload):
            return await self._reload(step.name)
        connection = open_.get(step.connection)
        if isinstance(step, Leave):
            return connection and await self._leave(open_.pop(step.connection), step.how)
        if connection is None:
            connection = open_[step.connection] = RawConnection(self.front.port)
            await connection.open()
        said = await self._send(connection, step)
        if connection.has_ended:
            connection.close()
            del open_[step.connection]
            said.append("closed")
        return said

    async def _send(self, connection: RawConnection, step: Send) -> list[Any]:
        answered, tokens = self.engine.answered, self.engine.tokens
        await connection.send(step.data.replace(LAST_ETAG, self._last_etag))
        if not step.asked:
            if step.waits:
                await self._settle()
            return []
        said: list[Any] = []
        for method, path, model in step.asked:
            reply = await connection.reply_to(method)
            while reply is not None and reply.status == 100:
                # Whether a body has come when its request's turn comes is a matter of time.
                reply = await connection.reply_to(method)
            if reply is None:
                break
            said.append(self._plain(reply, connection))
            if model == STALE and "; hit;" in (reply.header("Cache-Status") or ""):
                # A refresh has begun.
                answered += 1
            await self._await_store(path, reply, answered, tokens)
            if reply.header("Connection") == "close":
                rest = await connection.rest()
                assert not rest, rest
            answered, tokens = self.engine.answered, self.engine.tokens
        connection.waits_since = None
        return said

    async def _await_store(self, path: str, reply: Reply, answered: int, tokens: int) -> None:
        """Wait until what the engine has answered is stored, so that the next step finds it."""
        status = reply.header("Cache-Status") or ""
        if path == "/v1/responses" and re.search("fwd=(miss|request|stale)$", status):
            # The engine first has to show that it doesn't stop.
            tokens += reply.status == 200
        await self.engine.until(answered=answered, tokens=tokens)
        if "fwd=" in status or "ttl=-" in status:
            await self._settle()

    async def _settle(self) -> None:
        """Have the server do all that it can do without waiting."""
        for _ in range(3):
            await self.ask("/health")

    async def _leave(self, connection: RawConnection, how: str) -> Any:
        if how == "half-close":
            # A client that half-closes within a response counts as gone.
            for _ in range(2):
                await self._settle()
                await self.engine.until_idle()
        if how in ("half-close", "end"):
            connection.half_close()
            rest = await self._rest(connection)
            connection.close()
            return rest
        connection.abort() if how == "reset" else connection.close()
        await self._settle()
        return None

    async def _end(self, connection: RawConnection) -> Any:
        """Show whether the server would have taken another request."""
        await connection.send(_PROBE)
        connection.half_close()
        self._own += 1
        rest = await self._rest(connection)
        connection.close()
        return rest

    async def _rest(self, connection: RawConnection) -> list[Any]:
        said = []
        while (reply := await connection.reply_to("POST")) is not None:
            if reply.status != 100:
                said.append(self._plain(reply, connection))
        return said

    def _plain(self, reply: Reply, connection: RawConnection) -> Any:
        """Check what differs by nature, and return the rest."""
        began, now = connection.waits_since, time.time()
        assert began is not None, "nobody asked for this"
        body, headers = reply.body, []
        status = reply.header("Cache-Status") or ""
        self.outcomes[re.sub(r"-?\d+", "", status)] += 1
        for name, value in reply.headers:
            if name == "Date":
                assert began - 2 < parsedate_to_datetime(value).timestamp() < now + 2
                value = ""
            elif name == "X-Request-Id" and re.fullmatch("[0-9a-f]{32}", value):
                assert value not in self._ids
                self._ids.add(value)
                body, value = body.replace(value.encode(), b"ID"), ""
            elif name == "Age":
                value = self._check_times(reply, int(value), began, now)
            elif name == "Cache-Status":
                value = _ttl.sub("ttl", value)
            elif name == "x-ratelimit-reset-requests" or (
                name == "Retry-After" and reply.status == 429
            ):
                value = ""
            elif name == "ETag":
                self._last_etag = value.encode()
            headers.append((name, value))
        for created in _created.findall(body) if "hit" in status else ():
            assert began - 2 < int(created) < now + 2
        body = _created.sub(b'"created":0', body)
        return reply.line, tuple(headers), body

    def _check_times(self, reply: Reply, age: int, began: float, now: float) -> str:
        """Return for how long an entry was good, having checked that it was stored just once."""
        ttl = _ttl.search(reply.header("Cache-Status") or "")
        if ttl is None:
            return str(age)
        etag = reply.header("ETag") or ""
        first, last = self._stored.get(etag, (0, now))
        # The server rounds down.
        first, last = max(first, began - age - 1), min(last, now - age)
        assert first <= last, f"the age of {etag} is wrong: {reply}"
        self._stored[etag] = first, last
        total = age + int(ttl[1])
        return str(total + 1 if (total + 1) % 10 == 0 else total)

    async def ask(self, path: str) -> Reply:
        """Return the answer of one of the server's own paths."""
        self._own += 1
        await self._control.send(f"GET {path} HTTP/1.1\r\n{_OURS}\r\n".encode())
        reply = await self._control.reply_to("GET")
        assert reply is not None
        return reply

    async def administer(self, method: str, path: str, body: bytes = b"") -> Any:
        head = f"{method} {path} HTTP/1.1\r\n{_OURS}Content-Length: {len(body)}\r\n\r\n"
        while True:
            self._own += 1
            await self._admin.send(head.encode() + body)
            reply = await self._admin.reply_to(method)
            assert reply is not None
            # A purge that the disk took too long for holds, and may be made again.
            if reply.status != 503:
                assert reply.status == 200, reply
                return orjson.loads(reply.body)

    async def _purge(self, purge: Purge) -> str:
        name: Any = purge.name
        if isinstance(name, int) and self._has_memory:
            # The disk tier's entries aren't listed while they are being replaced.
            listed = (await self.administer("GET", "/entries?limit=1000&tier=memory"))["entries"]
            keys = sorted({each["key"] for each in listed})
            if not keys:
                return "nothing to purge"
            name = keys[name % len(keys)]
        elif isinstance(name, int):
            purge, name = Purge("model", "m"), "m"
        body = orjson.dumps({purge.kind: True if purge.kind == "all" else name})
        return str(await self.administer("POST", "/purge", body))

    async def _reload(self, name: str) -> None:
        self._tenants, self._marks = name, self._marks + 1
        self._write_tenants(name)
        self.front.process.send_signal(signal.SIGHUP)
        while f'"mark-{self._marks}"'.encode() not in (await self.ask("/metrics")).body:
            pass

    def _write_tenants(self, name: str) -> None:
        # The tenant without a key shows in metrics that the file has been read.
        new = self.folder / "tenants.new"
        new.write_bytes(orjson.dumps(TENANTS[name] | {f"mark-{self._marks}": {}}))
        new.rename(self.folder / "tenants.json")

    async def metrics(self) -> dict[str, float]:
        """Return all metrics but times, and without the requests that this class sent itself."""
        found: dict[str, float] = {}
        for line in (await self.ask("/metrics")).body.decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == _AT_ONCE:
                self.answered_at_once = int(float(value))
            elif name and name[0] != "#" and not _timed.match(name):
                # The request for them isn't counted yet.
                own = self._own - 1 if _own(name) else 0
                # Each side has an engine of its own.
                found[_upstream.sub("", name)] = float(value) - own
        return found

    async def entries(self) -> list[dict[str, Any]]:
        """Return what the tiers hold, with how often it was asked for."""
        listed = (await self.administer("GET", "/entries?limit=1000"))["entries"]
        for each in listed:
            del each["age_s"], each["ttl_s"]
        return sorted(listed, key=lambda each: str(each["key"]))

    async def history(self) -> dict[str, Any]:
        """Return how many answers each tier gave, and what that saved."""
        history = (await self.administer("GET", "/overview"))["history"]
        answered = {name: sum(steps) for name, steps in history["answered"].items()}
        return {"answered": answered, "tokens": history["saved_since_start"]["tokens"]}

    def access_log(self) -> Counter[tuple[str, ...]]:
        """Return the lines of requests in the log, without ids and times, once the server ended."""
        lines = map(orjson.loads, self.front.log.read_bytes().splitlines())
        return Counter(
            (line["message"], line["tier"], line["outcome"], _id_of(line["request_id"]))
            for line in lines
            if line.get("name") == "tierserve.access"
            and line["request_id"] != _CONTROL
            and "/ready" not in line["message"]
        )

    def trace(self) -> Counter[str]:
        """Return the lines of the trace, without times, once the server has ended."""
        lines = map(orjson.loads, (self.folder / "trace.jsonl").read_bytes().splitlines())
        # The digests of prompts are keyed.
        return Counter(str(sorted((line | {"time": 0, "blocks": 0}).items())) for line in lines)


def _id_of(request: str) -> str:
    return "ID" if re.fullmatch("[0-9a-f]{32}", request) else request


def examples(number: int, *, long: int) -> settings:
    """Return the settings of a test that compares two servers with so many examples."""
    return settings(
        max_examples=long if LONG else number,
        database=None,
        # A smaller example would meet servers in another state.
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@asynccontextmanager
async def both_ways(folder: Path, **options: Any) -> AsyncIterator[tuple[Side, Side]]:
    """A server that answers known requests at once, and one that doesn't; `options` are of `Side`.

    In the end their logs tell of no failure.
    """
    one, other = (
        Side(folder / str(known), {"server": {"known_requests": known}}, **options)
        for known in (True, False)
    )
    async with one, other:
        yield one, other
    for side in (one, other):
        log = side.front.log.read_text()
        assert "Traceback" not in log
        assert "a request failed" not in log


def difference(script: Sequence[Step], said: list[Any], expected: list[Any]) -> str:
    """Return the steps up to the first that had another result, and both results."""
    same = [one == other for one, other in zip(said, expected, strict=True)]
    # Only the engines were asked differently where all are the same.
    at = same.index(False) if False in same else len(script) - 1
    steps = "\n".join(map(str, script[: at + 1]))
    return f"{steps}\n\nat once: {said[at]}\n\nusual:   {expected[at]}"
