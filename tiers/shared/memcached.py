"""The shared tier's backend on Memcached.

The protocol is at https://github.com/memcached/memcached/blob/master/doc/protocol.txt.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from math import ceil
from typing import Any

import aiomcache
from aiocache import MemcachedCache
from aiocache.serializers import NullSerializer
from aiomcache.exceptions import ClientException
from aiomcache.pool import Connection, MemcachePool

from tiers.key import digest
from tiers.shared import NAMESPACE

_CONNECTIONS = 16
_MAX_KEY_BYTES = 250
# Memcached reads a larger number as a Unix time.
_MAX_RELATIVE_S = 30 * 24 * 3600
_LAST_TIME = 2**31 - 1
_REFUSED = ("SERVER_ERROR object too large for cache", "SERVER_ERROR out of memory storing object")


class _Pool(MemcachePool):
    """A pool that opens connections one by one, at most `size`, one for each call under way.

    aiomcache's own pool reuses a connection whose call was cancelled at its deadline, so that the
    next call reads the late reply as its own.
    """

    def __init__(self, host: str, port: int, size: int) -> None:
        super().__init__(host, port, minsize=0, maxsize=size)
        self._slots = asyncio.Semaphore(size)

    async def acquire(self) -> Connection:
        await self._slots.acquire()
        try:
            conn = self._take_idle() or Connection(
                *await asyncio.open_connection(self._host, self._port)
            )
        except BaseException:
            self._slots.release()
            raise
        self._in_use.add(conn)
        return conn

    def release(self, conn: Connection) -> None:
        if sys.exception() is not None:
            # A reply may still come, so nobody may use this connection again.
            conn.reader.set_exception(ConnectionAbortedError("a call has not ended"))
        super().release(conn)
        self._slots.release()

    def _take_idle(self) -> Connection | None:
        while not self._pool.empty():
            conn = self._pool.get_nowait()
            if not conn.reader.at_eof() and conn.reader.exception() is None:
                return conn
            self._do_close(conn)
        return None


class _Client(aiomcache.Client):
    def __init__(self, host: str, port: int, size: int) -> None:
        super().__init__(host, port, pool_size=size)
        self._pool = _Pool(host, port, size)

    async def _execute_simple_command(self, conn: Connection, raw_command: bytes) -> bytes:
        # aiomcache's own loops for ever, blocking the event loop, if the server closes instead.
        conn.writer.write(raw_command)
        await conn.writer.drain()
        return (await conn.reader.readuntil(b"\r\n"))[:-2]


class MemcachedBytes(MemcachedCache):
    """aiocache's Memcached cache for bytes. Connects when it is first used.

    A value that the server refuses, because it is too large or there is no room, isn't stored; that
    is no failure, and the server drops the value before it. A ttl is rounded up to whole seconds.

    Args:
        host: a name or an address.
        port: a TCP port.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        namespace: str = f"{NAMESPACE}:",
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            endpoint=host,
            port=port,
            serializer=NullSerializer(encoding=None),
            namespace=namespace,
            timeout=0,
        )
        self.client = _Client(host, port, _CONNECTIONS)
        self._clock = clock

    def _build_key(self, key: str, namespace: str | None = None) -> bytes:
        built: bytes = super()._build_key(key, namespace=namespace)
        if len(built) <= _MAX_KEY_BYTES:
            return built
        return self._build_key(digest(key.encode()), namespace=namespace)

    async def _set(
        self, key: bytes, value: bytes, ttl: float | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        try:
            return bool(await super()._set(key, value, self._exptime(ttl), *args, **kwargs))
        except ClientException as exc:
            if any(refused in str(exc) for refused in _REFUSED):
                return False
            raise

    def _exptime(self, ttl: float | None) -> int:
        if ttl is None:
            return 0
        seconds = max(ceil(ttl), 1)
        if seconds <= _MAX_RELATIVE_S:
            return seconds
        return min(ceil(self._clock()) + seconds, _LAST_TIME)
