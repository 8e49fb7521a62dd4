"""What tiers hold: an answer, and the entry that wraps it with its times."""

from collections.abc import Iterable
from enum import IntEnum
from math import isfinite
from struct import Struct, error
from typing import NamedTuple, Self

# Each hit decodes an entry: `NamedTuple`'s own way to make it takes twice as long.
_new = tuple.__new__

_HEADER = Struct("<BBdddddQII")
_VERSION = 3

SKEW_S = 1.0
"""By how much the clocks of machines that share a tier may differ."""


class Answer(NamedTuple):
    """A finished output of an engine. What its bytes mean is for the caller to say."""

    encoding: int
    """How the caller encodes the content, from 0 to 255; tiers only keep it."""
    content: bytes
    trailer: bytes = b""
    """What follows the content, kept apart since only some callers ask for it."""


class Freshness(NamedTuple):
    """How long an answer is good for, in seconds (RFC 5861 for the last two)."""

    ttl_s: float
    stale_while_revalidate_s: float = 0
    """After the ttl: given out while a new answer is made."""
    stale_if_error_s: float = 0
    """After the ttl: given out where no new answer can be had."""


class Provenance(NamedTuple):
    """What `tiers.purges` must know of how an answer came to be."""

    purge_epoch: int = 0
    """The last purge that was known when its making began, as `tiers.purges` numbers them."""
    packed_labels: bytes = b""

    @classmethod
    def of(cls, purge_epoch: int, labels: Iterable[str]) -> Self:
        """Return the origin of an answer that may be purged by `labels`.

        Raises:
            ValueError: a label is empty or has a line's end in it.
        """
        labels = tuple(labels)
        if not all(label and "\n" not in label for label in labels):
            raise ValueError("a label should be text without a line's end")
        return cls(purge_epoch, "\n".join(labels).encode())

    @property
    def labels(self) -> tuple[str, ...]:
        """By what it may be purged, beside its key."""
        return tuple(self.packed_labels.decode().split("\n")) if self.packed_labels else ()


class State(IntEnum):
    """What an entry may be used for."""

    FRESH = 0
    STALE_WHILE_REVALIDATE = 1
    """May be given out if a new answer is made meanwhile."""
    STALE_IF_ERROR = 2
    """May be given out where no new answer can be had."""
    EXPIRED = 3


class Entry(NamedTuple):
    """An answer in a tier. Times are Unix seconds."""

    answer: Answer
    stored_at: float
    expires_at: float
    """When it stops being fresh."""
    generation_s: float = 0
    """Seconds that it took to generate."""
    stale_while_revalidate_s: float = 0
    stale_if_error_s: float = 0
    purge_epoch: int = 0
    packed_labels: bytes = b""

    @property
    def provenance(self) -> Provenance:
        """How it came to be."""
        return Provenance(self.purge_epoch, self.packed_labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """By what it may be purged, beside its key."""
        return self.provenance.labels

    @property
    def kept_until(self) -> float:
        """When it is of no use any more."""
        return self.expires_at + max(self.stale_while_revalidate_s, self.stale_if_error_s)

    def state(self, now: float) -> State:
        """Return what it may be used for at `now`.

        How old an entry from the future is can't be told, so it is of no use: the clock was ahead
        when it was stored, or has been set back since. One that is older than what the clock was
        set back by can't be told from others, and lasts longer by that.
        """
        if now < self.expires_at:
            return State.FRESH if self.stored_at <= now + SKEW_S else State.EXPIRED
        if now < self.expires_at + self.stale_while_revalidate_s:
            return State.STALE_WHILE_REVALIDATE
        return State.STALE_IF_ERROR if now < self.kept_until else State.EXPIRED

    def encode(self) -> bytes:
        """Return the bytes that tiers store."""
        answer, *numbers, labels = self
        head = _HEADER.pack(_VERSION, answer.encoding, *numbers, len(labels), len(answer.trailer))
        return b"".join((head, labels, answer.trailer, answer.content))

    @staticmethod
    def provenance_of(data: bytes) -> Provenance:
        """Read the origin alone of what `encode` wrote.

        Raises:
            ValueError: the bytes are of another format version, or cut short.
        """
        if len(data) < _HEADER.size or data[0] != _VERSION:
            raise ValueError("entry is of another format version or cut short")
        *_, generation, labels_bytes, _ = _HEADER.unpack_from(data)
        return Provenance(generation, data[_HEADER.size : _HEADER.size + labels_bytes])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` wrote.

        Raises:
            ValueError: the bytes are of another format version, or cut short.
        """
        try:
            version, encoding, *fields, labels_bytes, trailer_bytes = _HEADER.unpack_from(data)
        except error as exc:
            raise ValueError("entry is cut short") from exc
        trailer_at = _HEADER.size + labels_bytes
        content_at = trailer_at + trailer_bytes
        if version != _VERSION or content_at > len(data):
            raise ValueError("entry is of another format version or cut short")
        answer = _new(Answer, (encoding, data[content_at:], data[trailer_at:content_at]))
        return _new(cls, (answer, *fields, data[_HEADER.size : trailer_at]))

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Read the same where no checksum has told that these are the bytes that were stored.

        Raises:
            ValueError: as `decode`, or labels aren't text, or a time isn't finite.
        """
        entry = cls.decode(data)
        entry.packed_labels.decode()
        times = (entry.stored_at, entry.expires_at, entry.generation_s, entry.kept_until)
        lasts = (entry.stale_while_revalidate_s, entry.stale_if_error_s)
        if not all(map(isfinite, (*times, *lasts))):
            raise ValueError("entry has a time that isn't finite")
        return entry
