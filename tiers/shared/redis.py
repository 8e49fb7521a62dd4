"""The shared tier's backend on Redis, Valkey, or another server with their protocol."""

from typing import Any

from aiocache.backends.redis import RedisCache
from aiocache.serializers import NullSerializer
from redis.asyncio import BlockingConnectionPool, SSLConnection
from redis.exceptions import OutOfMemoryError

from tiers.shared import NAMESPACE

_CONNECTIONS = 16
# Longer than callers wait: a slow connect goes on without them and serves the next call.
_CONNECT_S = 3.0
_LEAST_TTL_S = 0.001


class RedisBytes(RedisCache):
    """aiocache's Redis cache for bytes, with a bounded pool. Connects when it is first used.

    A value that a full server refuses isn't stored, which is no failure.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py's `ConnectionPool.from_url` takes it.

    Raises:
        ValueError: the URL can't be read.
        OSError: a file of certificates or keys that the URL names can't be used.
    """

    def __init__(self, url: str, *, namespace: str = NAMESPACE) -> None:
        # Calls wait for a free connection; redis-py's plain pool would fail them. RESP2 saves the
        # round trip that negotiates RESP3.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=None,
            socket_connect_timeout=_CONNECT_S,
            socket_timeout=None,
            protocol=2,
        )
        if issubclass(pool.connection_class, SSLConnection):
            pool.connection_class = _with_one_context(pool)
        super().__init__(
            serializer=NullSerializer(encoding=None),
            namespace=namespace,
            timeout=0,
            connection_pool_class=lambda **_: pool,
        )

    async def time_s(self) -> float:
        """Return the Unix seconds of the server's clock."""
        seconds, microseconds = await self.client.time()
        return int(seconds) + int(microseconds) / 1e6

    async def _set(
        self, key: str, value: bytes, ttl: float | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        if ttl is not None:
            # aiocache sends a float in milliseconds, and zero is an error.
            ttl = max(float(ttl), _LEAST_TTL_S)
        try:
            return bool(await super()._set(key, value, ttl, *args, **kwargs))
        except OutOfMemoryError:
            return False

    async def _clear(self, namespace: str | None = None, _conn: Any = None) -> bool:
        # Never flush the whole server, which others may use too.
        return bool(await super()._clear(namespace or self.namespace, _conn=_conn))

    async def _close(self, *args: Any, **kwargs: Any) -> None:
        await self.client.aclose()


def _with_one_context(pool: BlockingConnectionPool) -> type[SSLConnection]:
    """Return a connection class whose instances share one TLS context.

    Making a context blocks the event loop for tens of milliseconds.
    """
    shared = SSLConnection(**pool.connection_kwargs).ssl_context
    shared.get()

    class Connection(SSLConnection):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.ssl_context = shared

    return Connection
