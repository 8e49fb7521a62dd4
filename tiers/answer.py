"""What tiers hold: an answer, and the entry that wraps it with its times.

An answer keeps the form in which the engine gave it, because that form is exact; the other form
is derived from it on demand. `id` and `created` differ each time an answer is given, so content
is a template: in their place stand the bytes `ID` and `CREATED`, which JSON forbids unescaped
(RFC 8259, section 7) and which therefore can't be part of an answer.
"""

from enum import IntEnum
from struct import Struct, error
from typing import NamedTuple, Self

ID = b"\x00"
CREATED = b"\x01"

_HEADER = Struct("<BBdddddI")
_VERSION = 2


class Form(IntEnum):
    """How the engine gave the answer."""

    BODY = 0
    """One JSON body."""
    EVENTS = 1
    """A stream of server-sent events."""


_FORMS = tuple(Form)


class Answer(NamedTuple):
    """A finished assistant output, as a template in one of two forms."""

    form: Form
    content: bytes
    """The JSON body, or the events (`data: …`, an empty line) without the final `[DONE]`."""
    usage: bytes = b""
    """The event with the token counts, kept apart since only some clients ask for it."""


class Freshness(NamedTuple):
    """How long an answer is good for, in seconds (RFC 5861 for the last two)."""

    ttl_s: float
    stale_while_revalidate_s: float = 0
    """After the ttl: given out while a new answer is made."""
    stale_if_error_s: float = 0
    """After the ttl: given out where no new answer can be had."""


class State(IntEnum):
    """What an entry may be used for."""

    FRESH = 0
    STALE = 1
    """May be given out if a new answer is made meanwhile."""
    FALLBACK = 2
    """May be given out where no new answer can be had."""
    EXPIRED = 3


class Entry(NamedTuple):
    """An answer in a tier. Times are Unix seconds."""

    answer: Answer
    stored_at: float
    expires_at: float
    """When it stops being fresh."""
    took_s: float = 0
    """Seconds that it took to generate."""
    stale_while_revalidate_s: float = 0
    stale_if_error_s: float = 0

    @property
    def kept_until(self) -> float:
        """When it is of no use any more."""
        return self.expires_at + max(self.stale_while_revalidate_s, self.stale_if_error_s)

    def state(self, now: float) -> State:
        """Return what it may be used for at `now`."""
        if now < self.expires_at:
            return State.FRESH
        if now < self.expires_at + self.stale_while_revalidate_s:
            return State.STALE
        return State.FALLBACK if now < self.kept_until else State.EXPIRED

    def encode(self) -> bytes:
        """Return the bytes that tiers store."""
        answer, *times = self
        head = _HEADER.pack(_VERSION, answer.form, *times, len(answer.usage))
        return b"".join((head, answer.usage, answer.content))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` wrote.

        Raises:
            ValueError: the bytes are of another format version, or cut short.
        """
        try:
            version, form, *times, usage_bytes = _HEADER.unpack_from(data)
        except error as exc:
            raise ValueError("entry is cut short") from exc
        content_at = _HEADER.size + usage_bytes
        if version != _VERSION or content_at > len(data):
            raise ValueError("entry is of another format version or cut short")
        if form >= len(_FORMS):
            raise ValueError("entry is of an unknown form")
        answer = Answer(_FORMS[form], data[content_at:], data[_HEADER.size : content_at])
        return cls(answer, *times)
