"""The contract of an eviction policy.

A policy knows keys and what they cost in bytes, never values, and does no I/O. It says which
entry leaves; its owner holds the entries, decides when room is needed, and drops what leaves.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self


class Policy(ABC):
    """Decides which entry leaves a cache of at most `max_bytes`.

    The owner guarantees: a key is inserted only while it isn't in; it is accessed and removed only
    while it is in; no entry costs more than `max_bytes`; and after an insertion it evicts until
    what is in costs at most `max_bytes`. The policy guarantees: `evict` takes out one key that
    is in, and nothing else ever leaves unasked.
    """

    NAME: ClassVar[str]
    """What configurations call it."""

    OVERHEAD_BYTES: ClassVar[int]
    """The most that the policy was measured to take per entry that is in."""

    FIXED_SHARE: ClassVar[float] = 0
    """What it takes however little is in, as a share of `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    @classmethod
    def within(cls, total_bytes: int) -> Self:
        """Return a policy that, with the most that it lets in, takes `total_bytes`."""
        return cls(int(total_bytes / (1 + cls.FIXED_SHARE)))

    @abstractmethod
    def insert(self, key: str, size: int) -> None:
        """Take in `key`, whose entry costs `size` bytes. It counts as a request for the key."""

    @abstractmethod
    def access(self, key: str) -> None:
        """Note a hit on `key`."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Take out `key`, which left for another reason than room."""

    @abstractmethod
    def victim(self) -> str | None:
        """Return the key that `evict` would return now, or `None` where nothing is in.

        May rearrange what is in, as `evict` would; the answer holds until the next call of another
        method.
        """

    @abstractmethod
    def evict(self) -> str:
        """Take out and return the key that leaves for room; something must be in.

        It may be the key inserted last, which then wasn't admitted.
        """
