"""The base class of our backends, and the interface of a backend that also keeps blobs.

`ByteCache` maps aiocache's thirteen hooks to six primitives. A subclass stores bytes under text
keys and supplies `read`, `peek`, `write`, `touch`, `remove` and `keys`; those that only read are
synchronous and answer at once. `None` is a miss. aiocache is at https://aiocache.aio-libs.org
(0.12).
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from tiers.entry import Entry

MAX_KEY_BYTES = 511
"""The longest key that every backend of ours takes: LMDB's limit."""


@dataclass(slots=True)
class Usage:
    """What a backend holds, and counts since the process started."""

    entries: int = 0
    bytes: int = 0
    evictions: int = 0
    expirations: int = 0
    damaged: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class FileStatistics:
    """A backend's file in numbers. Sizes are in bytes."""

    entries: int
    used_bytes: int
    """Pages that hold entries, their indexes and blobs."""
    free_bytes: int
    """Pages that are reused before the file grows, those that list them included."""
    file_bytes: int
    map_bytes: int
    """What the file can grow to."""
    readers: int
    """The most slots of LMDB's table of readers that all processes have taken at once."""


class BlobStore(Protocol):
    """A backend that keeps blobs beside its entries, and both over a restart."""

    @property
    def is_open(self) -> bool:
        """Whether anything can be read."""

    async def opened(self) -> None:
        """Return when it is open.

        Raises:
            OSError: it can't be opened.
        """

    def load(self, name: str) -> bytes | None:
        """Return what was last saved under `name`, or `None` if it is missing or damaged."""

    def reload(self, name: str, known: bytes) -> bytes | None:
        """Return a blob unless it begins with `known`, or there is none.

        Raises:
            ValueError: it is damaged.
            OSError: nothing can be read now.
        """

    async def save(self, name: str, blob: bytes) -> bool:
        """Store a blob. Returns whether it is stored."""

    async def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bool:
        """Replace a blob by what `change` makes of it. Returns whether that is stored.

        No process writes meanwhile. `change` gets `None` if there is no blob, and `b""` if it is
        damaged. It may be called in another thread, and more than once.
        """

    def hottest(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Yield entries with their expiry (Unix s), those worth most first."""


class ByteCache(BaseCache):
    """An aiocache backend for bytes, bounded by its subclass.

    Args:
        max_bytes: the most that it may take.
        clock: returns Unix seconds; expiry is checked against it on every read.

    Raises:
        RuntimeError: aiocache is switched off through `AIOCACHE_DISABLE`.
    """

    in_memory = False
    """Whether entries are in this process alone: a write waits for nothing, an end loses all."""
    is_ordered = False
    """Whether `keys_after` and `ranked_keys` yield its keys."""
    path: Path | None = None
    """The folder of its file, if it has one."""
    queued_bytes = 0
    """What waits to be written."""

    def __init__(
        self, max_bytes: int, *, clock: Callable[[], float], namespace: str | None = None
    ) -> None:
        if os.environ.get("AIOCACHE_DISABLE") == "1":
            raise RuntimeError("AIOCACHE_DISABLE=1 would turn every read into a miss; unset it")
        super().__init__(
            serializer=NullSerializer(encoding=None), namespace=namespace, timeout=0, ttl=None
        )
        self.max_bytes = max_bytes
        self.clock = clock
        self.usage = Usage()

    @property
    def is_open(self) -> bool:
        """Whether entries can be read."""
        return True

    async def opened(self) -> None:
        """Return when entries can be read.

        Raises:
            OSError: they never can.
        """

    @abstractmethod
    def resize(self, max_bytes: int) -> None:
        """Take at most `max_bytes` from now on; what is too much leaves soon. Needs an event loop.

        Raises:
            ValueError: it can't be so small.
            OSError: there is no memory for one so large; nothing has changed.
        """

    def statistics(self) -> FileStatistics | None:
        """Return the file in numbers, or `None` where there is none or it can't be read now."""
        return None

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return the value, or `None` where there is none or it has expired."""

    @abstractmethod
    def peek(self, key: str) -> tuple[bytes, float | None] | None:
        """Return value and expiry (Unix s), or `None`; doesn't count as reading."""

    def read_entry(self, key: str) -> Entry | None:
        """Return the same as `read`, decoded.

        Raises:
            ValueError: the value is no entry of this format version.
        """
        value = self.read(key)
        return None if value is None else Entry.decode(value)

    def peek_entry(self, key: str, now: float) -> Entry | None:
        """Return the same as `peek` at `now` (Unix s), decoded, without the expiry.

        Raises:
            ValueError: the value is no entry of this format version.
        """
        held = self.peek(key)
        return None if held is None else Entry.decode(held[0])

    def note_read(self, key: str) -> None:
        """Count as read what was peeked."""

    @abstractmethod
    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        """Store `value`. Returns whether it is stored; later reads see it from the call on."""

    @abstractmethod
    async def touch(self, key: str, expires_at: float | None) -> bool:
        """Set an entry's expiry (Unix s). Returns whether there was one."""

    @abstractmethod
    async def remove(self, key: str) -> bool:
        """Drop an entry. Returns whether there was one."""

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """Return all keys, in any order."""

    def holds(self, key: str) -> bool:
        """Return whether there is an entry; doesn't count as reading it."""
        return self.peek(key) is not None

    def victim(self, value_bytes: int) -> str | None:
        """Return the key that would leave first for a value of `value_bytes`.

        `None` where there is room, or where the backend doesn't know.
        """
        return None

    def keys_after(self, key: str = "") -> Iterator[str]:
        """Yield keys in their order, those after `key`, while others may change."""
        return iter(())

    def ranked_keys(self, below: bytes | None = None) -> Iterator[tuple[bytes, str]]:
        """Yield keys of entries from the one worth most, each after its rank, from below a rank."""
        return iter(())

    def entries(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Yield key, value and expiry (Unix s) of all entries, where the backend supports it."""
        return iter(())

    def _expiry(self, ttl: float | None) -> float | None:
        return None if ttl is None else self.clock() + ttl

    async def _get(self, key: str, encoding: str | None = None, _conn: Any = None) -> bytes | None:
        return self.read(key)

    async def _gets(self, key: str, encoding: str | None = None, _conn: Any = None) -> bytes | None:
        return self.read(key)

    async def _multi_get(
        self, keys: Iterable[str], encoding: str | None = None, _conn: Any = None
    ) -> list[bytes | None]:
        return [self.read(key) for key in keys]

    async def _set(
        self,
        key: str,
        value: bytes,
        ttl: float | None = None,
        _cas_token: bytes | None = None,
        _conn: Any = None,
    ) -> bool:
        if _cas_token is not None and self.read(key) != _cas_token:
            return False
        return await self.write(key, value, self._expiry(ttl))

    async def _multi_set(
        self, pairs: Iterable[tuple[str, bytes]], ttl: float | None = None, _conn: Any = None
    ) -> bool:
        stored = [await self.write(key, value, self._expiry(ttl)) for key, value in pairs]
        return all(stored)

    async def _add(
        self, key: str, value: bytes, ttl: float | None = None, _conn: Any = None
    ) -> bool:
        if self.read(key) is not None:
            raise ValueError(f"Key {key} already exists, use .set to update the value")
        return await self.write(key, value, self._expiry(ttl))

    async def _delete(self, key: str, _conn: Any = None) -> int:
        return int(await self.remove(key))

    async def _exists(self, key: str, _conn: Any = None) -> bool:
        return self.holds(key)

    async def _increment(self, key: str, delta: int, _conn: Any = None) -> int:
        try:
            value = int(self.read(key) or b"0") + delta
        except ValueError:
            raise TypeError("Value is not an integer") from None
        await self.write(key, b"%d" % value, None)
        return value

    async def _expire(self, key: str, ttl: float | None, _conn: Any = None) -> bool:
        return await self.touch(key, self._expiry(ttl or None))

    async def _clear(self, namespace: str | None = None, _conn: Any = None) -> bool:
        for key in [key for key in self.keys() if key.startswith(namespace or "")]:
            await self.remove(key)
        return True

    async def _raw(self, command: str, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_conn", None)
        kwargs.pop("encoding", None)
        return getattr(self, command)(*args, **kwargs)

    async def _redlock_release(self, key: str, value: bytes) -> int:
        return int(self.read(key) == value and await self.remove(key))
