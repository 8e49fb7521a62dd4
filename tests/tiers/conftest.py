"""What the tests of the tiers share: a clock that only tests move, and every backend."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from tests.waiting import HANGS_S
from tiers import DiskCache, MemoryCache
from tiers.backend import ByteCache
from tiers.disk import Durability
from tiers.disk.recovery import Recovery
from tiers.disk.verify import VerifyReport
from tiers.policies import POLICIES
from tiers.shared.memcached import MemcachedBytes
from tiers.shared.redis import RedisBytes

JSON, SSE = 0, 1
"""Two encodings; tiers don't know what they mean."""


@pytest.fixture(autouse=True)
def _machine_may_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the bounds that can't be configured, since no test here is about them."""
    monkeypatch.setattr("tiers.tier._WRITE_S", HANGS_S)
    monkeypatch.setattr("tiers.shared.redis._CONNECT_S", HANGS_S)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def may_verify(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no file is verified, and so none is opened that has to be."""
    goes_on, verify = threading.Event(), Recovery.verify

    def wait(self: Recovery, *, repair: bool) -> VerifyReport:
        while not (goes_on.wait(0.01) or self._cancelled.is_set()):
            pass
        return verify(self, repair=repair)

    monkeypatch.setattr(Recovery, "verify", wait)
    yield goes_on
    goes_on.set()


OWN = [*POLICIES, "disk"]


def make_own(name: str, clock: Clock, folder: Path) -> ByteCache:
    if name == "disk":
        return DiskCache(folder / "disk", 1024 * 1024, durability=Durability.OS, clock=clock)
    return MemoryCache(1024 * 1024, policy=name, clock=clock)


@pytest.fixture(params=OWN)
async def own(request, clock: Clock, tmp_path: Path) -> AsyncIterator[ByteCache]:
    """Each backend of ours: memory with each policy, and disk."""
    made = make_own(request.param, clock, tmp_path)
    yield made
    await made.close()


@pytest.fixture(params=[*OWN, "redis", "unix", "memcached"])
async def cache(request, clock: Clock, tmp_path: Path) -> AsyncIterator[BaseCache]:
    """Each backend, empty."""
    made: BaseCache
    if request.param in OWN:
        made = make_own(request.param, clock, tmp_path)
    elif request.param == "memcached":
        server = request.getfixturevalue("memcached_server")
        made = MemcachedBytes("127.0.0.1", server.port)
    else:
        server = request.getfixturevalue("redis_server")
        made = RedisBytes(server.url if request.param == "redis" else server.unix_url)
    await made.clear()
    yield made
    await made.close()


class Remote(BaseCache):
    """A backend on the other side of a network: each call goes there and comes back in turns.

    `delay` says how many turns of the loop a call takes each way.
    """

    NAME = "remote"

    def __init__(self, clock: Clock, delay: Callable[[], int]) -> None:
        super().__init__(serializer=NullSerializer(encoding=None), timeout=0)
        self.clock, self.delay = clock, delay
        self.held: dict[str, tuple[bytes, float]] = {}
        self.at_once = self.most_at_once = 0

    async def _go(self, there) -> object:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        for _ in range(self.delay()):
            await asyncio.sleep(0)
        found = there()
        for _ in range(self.delay()):
            await asyncio.sleep(0)
        self.at_once -= 1
        return found

    def _find(self, key: str) -> bytes | None:
        value, expires_at = self.held.get(key, (None, 0))
        return value if expires_at > self.clock.now else None

    async def _get(self, key, encoding=None, _conn=None):
        return await self._go(lambda: self._find(key))

    async def _exists(self, key, _conn=None):
        return await self._go(lambda: self._find(key) is not None)

    async def _delete(self, key, _conn=None):
        return await self._go(lambda: self.held.pop(key, None) is not None)

    async def _set(self, key, value, ttl=None, _cas_token=None, _conn=None):
        await self._go(lambda: self.held.update({key: (value, self.clock.now + ttl)}))
        return True


_number = itertools.count()


@pytest.fixture
def key() -> str:
    """A key that no other test has used."""
    return f"key-{next(_number)}"
