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

_HEADER = Struct("<BBddI")
_VERSION = 1


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


class Entry(NamedTuple):
    """An answer in a tier. Times are Unix seconds."""

    answer: Answer
    stored_at: float
    expires_at: float

    def encode(self) -> bytes:
        """Return the bytes that tiers store."""
        answer = self.answer
        head = _HEADER.pack(
            _VERSION, answer.form, self.stored_at, self.expires_at, len(answer.usage)
        )
        return b"".join((head, answer.usage, answer.content))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` wrote.

        Raises:
            ValueError: the bytes are of another format version, or cut short.
        """
        try:
            version, form, stored_at, expires_at, usage_bytes = _HEADER.unpack_from(data)
        except error as exc:
            raise ValueError("entry is cut short") from exc
        content_at = _HEADER.size + usage_bytes
        if version != _VERSION or content_at > len(data):
            raise ValueError("entry is of another format version or cut short")
        if form >= len(_FORMS):
            raise ValueError("entry is of an unknown form")
        answer = Answer(_FORMS[form], data[content_at:], data[_HEADER.size : content_at])
        return cls(answer, stored_at, expires_at)
