"""The contract of an eviction policy.

A policy knows keys and their sizes in bytes, never values, and does no I/O. It chooses the entry
that leaves; its owner holds the entries, decides when room is needed, and drops what leaves.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self


class Policy(ABC):
    """Decides which entry leaves a cache of at most `max_bytes`.

    The owner guarantees that it inserts a key only while it is absent, and accesses or removes it
    only while it is present; that no entry costs more than `max_bytes`; and that it evicts after
    an insertion until the entries cost at most `max_bytes`. The policy guarantees that `evict`
    removes one key that is present, and that no other method but `remove` takes a key out.
    """

    NAME: ClassVar[str]
    """Its name in configurations."""

    OVERHEAD_BYTES: ClassVar[int]
    """The most memory that the policy was measured to take per entry."""

    FIXED_SHARE: ClassVar[float] = 0
    """The memory that it takes even while empty, as a share of `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    @classmethod
    def within(cls, total_bytes: int) -> Self:
        """Return a policy that takes at most `total_bytes`, with its entries and its own memory."""
        return cls(cls.bytes_within(total_bytes))

    @classmethod
    def bytes_within(cls, total_bytes: int) -> int:
        """Return what its entries may take of `total_bytes`."""
        return int(total_bytes / (1 + cls.FIXED_SHARE))

    def resize(self, max_bytes: int) -> None:
        """Decide for at most `max_bytes` from now on. It is quick, however many entries there are.

        The owner evicts what is too much, as it can, and may insert and access keys meanwhile.

        Raises:
            OSError: there is no memory for what it remembers; nothing has changed.
        """
        self.max_bytes = max_bytes

    @abstractmethod
    def insert(self, key: str, size: int) -> None:
        """Add `key`, whose entry costs `size` bytes. Counts as a request for the key."""

    @abstractmethod
    def access(self, key: str) -> None:
        """Record a hit on `key`."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove `key`, which leaves for another reason than room."""

    @abstractmethod
    def victim(self) -> str | None:
        """Return the key that `evict` would remove now, or `None` if the policy is empty.

        May rearrange the keys, as `evict` would. The result holds until the next call of another
        method.
        """

    @abstractmethod
    def evict(self) -> str:
        """Remove and return the key that leaves for room.

        It may be the key inserted last, which then wasn't admitted.

        Raises:
            KeyError: the policy is empty.
        """
