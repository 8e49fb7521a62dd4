"""First in, first out."""

from collections import OrderedDict

from tiers.policies.base import Policy


class FIFO(Policy):
    """The oldest entry leaves, however often it was requested."""

    NAME = "fifo"
    OVERHEAD_BYTES = 150

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._queue: OrderedDict[str, None] = OrderedDict()

    def insert(self, key: str, size: int) -> None:
        self._queue[key] = None

    def access(self, key: str) -> None:
        pass

    def remove(self, key: str) -> None:
        del self._queue[key]

    def victim(self) -> str | None:
        return next(iter(self._queue), None)

    def evict(self) -> str:
        return self._queue.popitem(last=False)[0]
