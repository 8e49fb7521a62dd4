"""JSON bodies of requests: how they are read and written, and how many prompts they hold.

orjson reads and writes them, and the slower `json` what orjson doesn't: integers beyond 64 bits,
and what engines take although it isn't JSON by RFC 8259.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from server.protocol.errors import BadRequestError

# orjson makes floats of integers beyond 64 bits, so two of them could share a key. They have 19
# digits or more; this finds them ten times as fast as a regular expression.
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_HUGE = b"0" * 19
_TOO_DEEP = "the body is nested too deeply"


def read_object(raw: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a body in UTF-8, and its fields. Other encodings and a BOM are read, too.

    Raises:
        BadRequestError: it isn't a JSON object by RFC 8259, or is nested too deeply.
    """
    try:
        try:
            value = _exact(orjson.loads(raw), raw)
        except ValueError:
            if (encoding := json.detect_encoding(raw)) == "utf-8":
                raise
            raw = raw.decode(encoding).encode()
            value = _exact(orjson.loads(raw), raw)
    except ValueError as exc:
        raise BadRequestError(f"the body should be JSON: {exc}", "body") from exc
    except RecursionError as exc:
        raise BadRequestError(_TOO_DEEP, "body") from exc
    if not isinstance(value, dict):
        raise BadRequestError("the body should be a JSON object", "body")
    return raw, value


def read_leniently(raw: bytes) -> tuple[bytes, Any]:
    """Return a body in UTF-8 and its value, with NaN and lone surrogates, which engines take.

    The value of what can't be read is `None`: engines refuse it in their own words.
    """
    try:
        value = orjson.loads(raw)
    except ValueError:
        pass
    else:
        # What `json` can't read here it can't write either, so no inexact integer is sent.
        with suppress(RecursionError):
            value = _exact(value, raw)
        return raw, value
    try:
        value = json.loads(raw)
        return json.dumps(value).encode(), value
    except (ValueError, RecursionError):
        return raw, None


def write(value: Mapping[str, Any]) -> bytes:
    """Return fields that `read_object` has read as JSON.

    Raises:
        BadRequestError: they are nested too deeply.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        # There is an integer beyond 64 bits, or it is nested more deeply than orjson writes.
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except RecursionError as exc:
            raise BadRequestError(_TOO_DEEP, "body") from exc


def write_leniently(value: Mapping[str, Any]) -> bytes:
    """Return fields that `read_leniently` has read as JSON, in ASCII.

    Raises:
        BadRequestError: they are nested too deeply.
    """
    try:
        return json.dumps(value).encode()
    except RecursionError as exc:
        raise BadRequestError(_TOO_DEEP, "body") from exc


def _exact(value: Any, raw: bytes) -> Any:
    """Return what orjson has read from `raw`, with integers beyond 64 bits as they are."""
    return json.loads(raw) if _HUGE in raw.translate(_DIGITS_AS_ZEROS) else value


# These hold several prompts as lists of texts or tokens. A list of objects is one conversation.
_LISTS_OF_TEXTS = ("images", "input", "messages", "prompt", "prompt_embeds", "texts")
# These hold what is scored or embedded, in lists of texts, tokens or objects.
_LISTS_OF_INPUTS = (
    "data_1", "data_2", "documents", "inputs", "items", "queries", "text_1", "text_2",
)  # fmt: skip


class Prompts(NamedTuple):
    """How many prompts a body has, and which field holds them.

    An engine runs each prompt as a request of its own, so a limit of requests limits little without
    one of prompts (`server.max_prompts`).
    """

    number: int
    field: str

    def check(self, most: int) -> None:
        """Refuse more than `most`.

        Raises:
            BadRequestError: there are more.
        """
        if self.number > most:
            text = f"{self.field} should have at most {most} prompts, not {self.number}"
            raise BadRequestError(text, self.field)


def count_prompts(body: Mapping[str, Any], *, is_conversation: bool) -> Prompts:
    """Return how many prompts a body has.

    Args:
        body: its fields.
        is_conversation: whether documents belong to the one prompt that its messages are.
    """
    found = [Prompts(_count(body.get(name), str | list), name) for name in _LISTS_OF_TEXTS]
    types = str | list if is_conversation else str | list | dict
    found += [Prompts(_count(body.get(name), types), name) for name in _LISTS_OF_INPUTS]
    return max(found)


def _count(value: Any, types: Any) -> int:
    """Return the length of a list whose items are of these types; the first stands for all."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], types) else 0
