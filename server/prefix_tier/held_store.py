"""A store that several threads use, and long work on it."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

from tiers.prefix_kv.index.index_file import INDEX
from tiers.prefix_kv.store import PrefixStore

_Result = TypeVar("_Result")


class HeldStore:
    """An open store, which whoever leaves it last closes: LMDB crashes if it is closed in use."""

    def __init__(self, store: PrefixStore) -> None:
        self.store = store
        self._users, self._lock = 1, threading.Lock()
        self._identity = self._identify()

    @property
    def is_open(self) -> bool:
        """Whether somebody still uses it."""
        return self._users > 0

    def is_replaced(self) -> bool:
        """Return whether the folder holds other files by now, as after it was moved away."""
        return self._identify() not in (self._identity, None)

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = (self.store.config.folder / INDEX).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def enter(self) -> bool:
        """Begin to use the store; returns whether it is still open."""
        with self._lock:
            self._users += self.is_open
            return self.is_open

    def leave(self) -> None:
        """End using it."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self.store.close()


async def beside(call: Callable[[], _Result]) -> _Result:
    """Return what a call returns that may take minutes; the process may end meanwhile."""
    loop, result = asyncio.get_running_loop(), asyncio.Future[_Result]()

    def end(value: _Result | None, failure: Exception | None) -> None:
        if result.done():
            return
        if failure is not None:
            result.set_exception(failure)
        else:
            result.set_result(cast("_Result", value))

    def run() -> None:
        value: _Result | None = None
        failure: Exception | None = None
        try:
            value = call()
        except Exception as exc:  # noqa: BLE001
            # It is raised where the result is awaited.
            failure = exc
        # Nobody waits any more if the loop has ended.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(end, value, failure)

    threading.Thread(target=run, name="prefix-tier-maintenance", daemon=True).start()
    return await result
