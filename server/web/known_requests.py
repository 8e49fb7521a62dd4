"""Known requests: raw requests that came before, and that are answered without parsing them.

The short way in. Where the bytes of one whole request arrive alone on an idle connection, their
digest is looked up here, and `server.web.connection` writes the answer at once: no parser, no task,
no request object. It is a second way in and no second truth: the bytes stand for what aiohttp's
parser made of them when they came first, and everything that may have changed since is asked anew
(`KnownRequest`).
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tiers.encryption import Fingerprint

logger = logging.getLogger(__name__)

# Some 300 bytes each, and a head of at most so many bytes.
_MAX_REQUESTS = 8192
_MAX_HEAD_BYTES = 1024
# A longer request takes so long to be received that parsing it doesn't matter.
_MAX_REQUEST_BYTES = 2 * 1024**2
# About a millisecond; the loop's other work then has its turn.
_MAX_ANSWERS_A_TURN = 64


KnownRequest = Callable[[], bytes | None]
"""Answers a request that came before: returns the whole response; `None`, having done nothing, if
it has to be parsed again."""


class Resumable(Protocol):
    """A connection whose request waits for its turn."""

    def resume(self) -> None:
        """Go on with the request."""


class KnownRequests:
    """The known requests of all connections of a server.

    A request is remembered when it came twice: heads that are different each time, such as with
    trace ids, would otherwise crowd out all others.
    """

    def __init__(self) -> None:
        self.digest = Fingerprint().of
        self.answered = 0
        """How many requests were answered without parsing them."""
        self._requests: OrderedDict[bytes, KnownRequest] = OrderedDict()
        self._heads: OrderedDict[bytes, int] = OrderedDict()
        self._came_once: set[bytes] = set()
        self._answers_this_turn, self._is_turn_coming = 0, False
        self._waiting: deque[Resumable] = deque()

    def find(self, digest: bytes) -> KnownRequest | None:
        """Return the request whose bytes have a digest."""
        request = self._requests.get(digest)
        if request is not None:
            self._requests.move_to_end(digest)
        return request

    def length_of(self, begin: bytes) -> int:
        """Return how long a request that begins so is, if requests with its head are known.

        0 stands for an unknown head, or for less than a head.
        """
        return self._heads.get(begin[: begin.find(b"\r\n\r\n") + 4], 0)

    def offer(self, head: bytes, body: bytes, request: KnownRequest) -> None:
        """Remember a request if it came before."""
        if len(head) > _MAX_HEAD_BYTES or len(head) + len(body) > _MAX_REQUEST_BYTES:
            return
        digest = self.digest(head + body)
        if digest not in self._came_once:
            if len(self._came_once) >= _MAX_REQUESTS:
                self._came_once.clear()
            self._came_once.add(digest)
            return
        self._requests[digest] = request
        self._heads[head] = len(head) + len(body)
        for table in (self._requests, self._heads):
            if len(table) > _MAX_REQUESTS:
                table.popitem(last=False)

    def forget(self) -> None:
        """Forget all requests, so that they are parsed again."""
        self._requests.clear()
        self._heads.clear()

    def answer(self, request: KnownRequest) -> bytes | None:
        """Return the response to a known request, or `None` if it has to be parsed again."""
        try:
            answer = request()
        except Exception:
            logger.exception("a known request could not be answered")
            return None
        self.answered += answer is not None
        return answer

    def takes_turn(self, connection: Resumable) -> bool:
        """Return whether a connection may be answered in this turn of the event loop.

        Otherwise it is resumed in a later one, so that hits never starve what else there is to do.
        """
        if self._answers_this_turn >= _MAX_ANSWERS_A_TURN:
            self._waiting.append(connection)
            return False
        self._answers_this_turn += 1
        self._see_to_next_turn()
        return True

    def wait(self, connection: Resumable) -> None:
        """Resume a connection in the next turn of the event loop that has room."""
        self._waiting.append(connection)
        self._see_to_next_turn()

    def _see_to_next_turn(self) -> None:
        if not self._is_turn_coming:
            self._is_turn_coming = True
            asyncio.get_running_loop().call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self._is_turn_coming, self._answers_this_turn = False, 0
        for _ in range(min(len(self._waiting), _MAX_ANSWERS_A_TURN)):
            self._waiting.popleft().resume()
        if self._waiting:
            self._see_to_next_turn()


class KnownRequestsCollector(Collector):
    """Reads how many known requests were answered, when it is scraped.

    Args:
        known: the known requests; `None` where all requests are parsed.
    """

    def __init__(self, known: KnownRequests | None) -> None:
        self._known = known

    def collect(self) -> Iterable[Metric]:
        answered = CounterMetricFamily(
            "tierserve_known_requests", "Hits answered without parsing their requests again"
        )
        answered.add_metric((), 0 if self._known is None else self._known.answered)
        return (answered,)
