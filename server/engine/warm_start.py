"""The warm start: fills an engine's own cache with the hottest prefixes on disk, after each start.

It sends requests for one token by vLLM's public API, each with a stored prefix as its prompt, so
the engine loads the prefix as for any request. Requests of clients go first: one of ours is sent
only while the engine has nothing else to do. The connector doesn't count our requests.
"""

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, NamedTuple

import orjson

from server.engine.routing.upstreams import Upstreams
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.options import DISK_TOKENS, WARM
from tiers.prefix_kv.scope import adapted

logger = logging.getLogger(__name__)

_PATH = "/v1/completions"
_HEADERS = {"Content-Type": "application/json"}
_IDLE_CHECK_S, _READY_CHECK_S = 0.05, 1.0
_WARM_S = 600
"""An engine without time for our requests for longer has other prefixes in its cache by then."""
_MAX_FAILURES = 3
"""In a row; then the engine doesn't load, and would only compute."""

IndexReading = Callable[[], AbstractContextManager[PrefixIndex]]


class StoredPrefix(NamedTuple):
    """A prefix that ends with one of the hottest blocks."""

    tokens: bytes
    adapter: str
    salt: str

    def request(self, model: str) -> bytes:
        """Return the body of a request that has the engine load it.

        Its last token stands twice, so that the engine loads all blocks: it computes at least one
        token of each prompt.
        """
        tokens = array("I", self.tokens).tolist()
        body = {
            "model": self.adapter or model,
            "prompt": [*tokens, tokens[-1]],
            "max_tokens": 1,
            "kv_transfer_params": WARM,
        }
        return orjson.dumps(body | ({"cache_salt": self.salt} if self.salt else {}))


class WarmStart:
    """Warms one model's engine after each of its starts.

    Args:
        reading: opens the index of the prefix tier for reading, in a thread.
        model: the model's name at its engine.
        adapters: returns the fingerprints of its adapters, by name.
        upstreams: the engine.
        share: of the engine's cache that may be filled.
        min_tokens: shorter prefixes aren't worth a load.
    """

    def __init__(
        self,
        reading: IndexReading,
        model: str,
        adapters: Callable[[], Mapping[str, str]],
        upstreams: Upstreams,
        *,
        share: float,
        min_tokens: int,
    ) -> None:
        self._reading, self._model, self._adapters = reading, model, adapters
        self._upstreams, (self._engine,) = upstreams, upstreams.all
        self._share, self._min_tokens = share, min_tokens

    async def run(self) -> None:
        """Warm the engine whenever it has become ready, until cancelled."""
        while True:
            await self._engine.ready_event.wait()
            since = self._engine.ready_since
            try:
                await self._warm(since)
            except Exception as exc:  # noqa: BLE001
                # Nothing that an index or an engine holds may end the server.
                logger.warning("the engine of %s isn't warmed: %s", self._model, exc)
            while self._engine.ready_since == since:  # noqa: ASYNC110
                await asyncio.sleep(_READY_CHECK_S)

    async def _warm(self, since: float | None) -> None:
        prefixes = await asyncio.to_thread(self.hottest)
        began_at, loaded, failures = time.monotonic(), 0, 0
        until = began_at + _WARM_S
        for prefix in prefixes:
            while self._upstreams.in_flight and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(_IDLE_CHECK_S)
            if self._engine.ready_since != since or time.monotonic() >= until:
                break
            tokens = await self._send(prefix)
            loaded += tokens
            failures = 0 if tokens else failures + 1
            if failures == _MAX_FAILURES:
                logger.info("the engine of %s loads no prefixes now", self._model)
                break
        if loaded:
            seconds = time.monotonic() - began_at
            text = "the engine of %s has %d tokens of prefixes in its cache again, after %.1f s"
            logger.info(text, self._model, loaded, seconds)

    async def _send(self, prefix: StoredPrefix) -> int:
        """Have the engine load a prefix; returns how many tokens it loaded."""
        body = prefix.request(self._model)
        async with self._upstreams.request("POST", _PATH, data=body, headers=_HEADERS) as reply:
            content = await reply.read()
        if reply.status != 200:
            # As where the prefix is as long as the model's context.
            return 0
        answer = orjson.loads(content)
        return int((answer.get("kv_transfer_params") or {}).get(DISK_TOKENS, 0))

    def hottest(self) -> list[StoredPrefix]:
        """Return the hottest prefixes that fit into the share, hottest first. It reads the index.

        Raises:
            lmdb.Error, OSError: the index can't be read.
        """
        with self._reading() as index:
            described = self._newest_scope(index)
            if described is None:
                return []
            scope, facts = described
            scopes = [scope, *(adapted(scope, each) for each in self._adapters().values())]
            most = int(self._share * facts["kv_blocks"])
            taken = [key for key, _ in islice(index.hottest(scopes), most)]
            least = max(self._min_tokens // facts["block_tokens"], 1)
            return list(_ends(index, taken, least))

    def _newest_scope(self, index: PrefixIndex) -> tuple[bytes, dict[str, Any]] | None:
        """Return the scope of the engine's first worker, and its description."""
        newest: tuple[bytes, dict[str, Any]] | None = None
        for scope, description in index.scopes().items():
            facts = orjson.loads(description)
            if (facts["model"], facts["rank"]) == (self._model, 0) and (
                newest is None or facts["opened_at"] > newest[1]["opened_at"]
            ):
                newest = scope, facts
        return newest


def _ends(index: PrefixIndex, keys: Sequence[bytes], least: int) -> Iterator[StoredPrefix]:
    """Yield the prefixes of `least` blocks or more that end with no other block's parent."""
    covered: set[bytes] = set()
    # A parent is never behind its children, so the last blocks come first this way.
    chains = []
    for key in reversed(keys):
        if key in covered:
            continue
        chain = index.chain_to(key)
        if chain is None or not all(block.is_plain for block, _ in chain):
            continue
        covered.update(block.key for block, _ in chain)
        chains.append(chain)
    for chain in reversed(chains):
        if len(chain) >= least:
            first = chain[0][1]
            tokens = b"".join(details.tokens for _, details in chain)
            yield StoredPrefix(tokens, first.adapter, first.salt)
