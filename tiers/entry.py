"""What tiers hold: an answer, and the entry that wraps it with its times and labels."""

from collections.abc import Iterable
from enum import IntEnum
from math import isfinite
from struct import Struct, error
from typing import NamedTuple, Self

# Each hit decodes an entry; calling a `NamedTuple` class takes twice as long.
_new = tuple.__new__

_HEADER = Struct("<BBdddddQII")
_VERSION = 3

MAX_ENCODING = 1
"""Of the encodings that callers know; an entry in another is a miss."""
SKEW_S = 1.0
"""How many seconds the clocks of machines that share a tier may differ by, once they are corrected
(`tiers.server_clock`)."""


class Answer(NamedTuple):
    """A finished answer. What its bytes mean is the caller's business."""

    encoding: int
    """The caller's number for how the content is encoded, from 0 to 255."""
    content: bytes
    trailer: bytes = b""
    """What follows the content; kept apart, since not every reader wants it."""


class Freshness(NamedTuple):
    """How long an answer may be used, in seconds (RFC 5861 for the last two)."""

    ttl_s: float
    stale_while_revalidate_s: float = 0
    """After the ttl, while a new answer is generated."""
    stale_if_error_s: float = 0
    """After the ttl, if no new answer can be generated."""


class Provenance(NamedTuple):
    """When an answer's generation began, and its labels: what decides whether it is purged."""

    purge_epoch: int = 0
    """The last purge that was known when its generation began, as `tiers.purges` counts them."""
    packed_labels: bytes = b""

    @classmethod
    def of(cls, purge_epoch: int, labels: Iterable[str]) -> Self:
        """Return the provenance of an answer that may be purged by `labels`.

        Raises:
            ValueError: a label is empty or has a line break.
        """
        labels = tuple(labels)
        if not all(label and "\n" not in label for label in labels):
            raise ValueError("a label should be text without a line break")
        return cls(purge_epoch, "\n".join(labels).encode())

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels by which it may be purged, beside its key."""
        return tuple(self.packed_labels.decode().split("\n")) if self.packed_labels else ()


class State(IntEnum):
    """What an entry may be used for."""

    FRESH = 0
    STALE_WHILE_REVALIDATE = 1
    """May be used while a new answer is generated."""
    STALE_IF_ERROR = 2
    """May be used if no new answer can be generated."""
    EXPIRED = 3


# Looked up once, since Python 3.11 takes 80 ns for it.
_FRESH = State.FRESH


class Entry(NamedTuple):
    """An answer in a tier. Times are Unix seconds."""

    answer: Answer
    stored_at: float
    expires_at: float
    """When it stops being fresh."""
    generation_s: float = 0
    """Seconds that its generation took."""
    stale_while_revalidate_s: float = 0
    stale_if_error_s: float = 0
    purge_epoch: int = 0
    packed_labels: bytes = b""

    @property
    def provenance(self) -> Provenance:
        """Its purge epoch and labels."""
        return Provenance(self.purge_epoch, self.packed_labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels by which it may be purged, beside its key."""
        return self.provenance.labels

    @property
    def kept_until(self) -> float:
        """When it expires for every use."""
        return self.expires_at + max(self.stale_while_revalidate_s, self.stale_if_error_s)

    def state(self, now: float) -> State:
        """Return what it may be used for at `now`.

        The age of an entry from the future is unknown, so it counts as expired: the clock was ahead
        when it was stored, or has been set back since. After the clock was set back, entries older
        than that last longer by as much.
        """
        if now < self.expires_at:
            return _FRESH if self.stored_at <= now + SKEW_S else State.EXPIRED
        if now < self.expires_at + self.stale_while_revalidate_s:
            return State.STALE_WHILE_REVALIDATE
        return State.STALE_IF_ERROR if now < self.kept_until else State.EXPIRED

    def later_by(self, seconds: float) -> Self:
        """Return the same by a clock that is ahead of ours by so many seconds."""
        if not seconds:
            return self
        stored_at, expires_at = self.stored_at + seconds, self.expires_at + seconds
        return self._replace(stored_at=stored_at, expires_at=expires_at)

    @property
    def encoded_bytes(self) -> int:
        """How many bytes `encode` returns."""
        answer = self.answer
        labels_bytes = len(self.packed_labels)
        return _HEADER.size + labels_bytes + len(answer.trailer) + len(answer.content)

    def encode(self) -> bytes:
        """Return the bytes that tiers store."""
        answer, *numbers, labels = self
        head = _HEADER.pack(_VERSION, answer.encoding, *numbers, len(labels), len(answer.trailer))
        return b"".join((head, labels, answer.trailer, answer.content))

    @staticmethod
    def provenance_of(data: bytes) -> Provenance:
        """Return only the provenance of an encoded entry.

        Raises:
            ValueError: the bytes are of another format version, or cut short.
        """
        if len(data) < _HEADER.size or data[0] != _VERSION:
            raise ValueError("entry is of another format version or cut short")
        *_, purge_epoch, labels_bytes, _ = _HEADER.unpack_from(data)
        return Provenance(purge_epoch, data[_HEADER.size : _HEADER.size + labels_bytes])

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Return the entry that `encode` wrote; it keeps nothing of a memoryview.

        Raises:
            ValueError: the bytes are of another format version, or cut short.
        """
        try:
            version, encoding, *fields, labels_bytes, trailer_bytes = _HEADER.unpack_from(data)
        except error as exc:
            raise ValueError("entry is cut short") from exc
        trailer_at = _HEADER.size + labels_bytes
        content_at = trailer_at + trailer_bytes
        if version != _VERSION or content_at > len(data) or encoding > MAX_ENCODING:
            raise ValueError("entry is of another format version or cut short")
        content, trailer = bytes(data[content_at:]), bytes(data[trailer_at:content_at])
        answer = _new(Answer, (encoding, content, trailer))
        return _new(cls, (answer, *fields, bytes(data[_HEADER.size : trailer_at])))

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Return the same from bytes that no checksum has verified.

        Raises:
            ValueError: as in `decode`, or labels aren't text, or a time isn't finite.
        """
        entry = cls.decode(data)
        entry.packed_labels.decode()
        times = (entry.stored_at, entry.expires_at, entry.generation_s, entry.kept_until)
        lasts = (entry.stale_while_revalidate_s, entry.stale_if_error_s)
        if not all(map(isfinite, (*times, *lasts))):
            raise ValueError("entry has a time that isn't finite")
        return entry
