"""Leases among all processes that use one Redis or Memcached server.

A lease is a key whose value names its owner. The owner renews it; it expires soon after its owner
has gone. Like aiocache's `RedLock` it is only as safe as one server and its clock, which is enough
for a lease (`tiers.singleflight.leases`). redis-py's own lock would need Redis; these go through
aiocache, so they serve Memcached too.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiocache.base import BaseCache
from aiocache.lock import OptimisticLock, OptimisticLockError

logger = logging.getLogger(__name__)

_RENEWALS = 3
"""How often a lease is renewed within its ttl, so that one failure doesn't lose it."""


@dataclass(slots=True)
class _Held:
    renewing: asyncio.Task[None]
    times: int = 1


class SharedLeases:
    """Leases in a backend. While the backend fails, each process gets every lease it asks for.

    Args:
        backend: an aiocache backend that stores bytes.
        deadline_s: seconds that taking, renewing or releasing may take.
        ttl_s: whole seconds after which the lease of an owner that has gone expires.
        is_available: whether it makes sense to ask the backend.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        backend: BaseCache,
        *,
        deadline_s: float,
        ttl_s: int = 6,
        is_available: Callable[[], bool] = lambda: True,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._backend, self._deadline_s, self._ttl_s = backend, deadline_s, ttl_s
        self._is_available, self._sleep = is_available, sleep
        self._owner = secrets.token_hex(16).encode()
        self._held: dict[str, _Held] = {}

    async def take(self, key: str) -> bool:
        taken = True
        if key not in self._held and self._is_available():
            try:
                async with asyncio.timeout(self._deadline_s):
                    taken = await self._add(_name_of(key))
            except Exception as exc:
                logger.debug("a lease can't be taken and counts as ours: %r", exc)
        if not taken:
            return False
        if (held := self._held.get(key)) is not None:
            held.times += 1
        else:
            self._held[key] = _Held(asyncio.create_task(self._renew(_name_of(key))))
        return True

    async def release(self, key: str) -> None:
        held = self._held[key]
        held.times -= 1
        if held.times:
            return
        del self._held[key]
        held.renewing.cancel()
        name = _name_of(key)
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._delete(name)
        except Exception as exc:
            logger.debug("a lease can't be released and will expire: %r", exc)

    async def close(self) -> None:
        for held in self._held.values():
            held.renewing.cancel()

    async def _add(self, name: str) -> bool:
        try:
            await self._backend.add(name, self._owner, ttl=self._ttl_s, timeout=None)
        except ValueError:
            # aiocache raises it if the key exists.
            return await self._is_ours(name)
        return True

    async def _delete(self, name: str) -> None:
        # Redis compares the owner again as it deletes; Memcached has no command for that.
        if await self._is_ours(name):
            await self._backend._redlock_release(self._backend.build_key(name), self._owner)

    async def _renew(self, name: str) -> None:
        while True:
            await self._sleep(self._ttl_s / _RENEWALS)
            try:
                async with asyncio.timeout(self._deadline_s):
                    await self._renew_once(name)
            except Exception as exc:
                logger.debug("a lease can't be renewed: %r", exc)

    async def _renew_once(self, name: str) -> None:
        async with OptimisticLock(self._backend, name) as unchanged:
            if not await self._is_ours(name):
                # The server may have restarted and lost it.
                await self._add(name)
                return
            with contextlib.suppress(OptimisticLockError):
                await unchanged.cas(self._owner, ttl=self._ttl_s, timeout=None)

    async def _is_ours(self, name: str) -> bool:
        return bool(await self._backend.get(name, timeout=None) == self._owner)


def _name_of(key: str) -> str:
    return f"lease:{key}"
