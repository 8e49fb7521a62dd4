"""Who does an act, and from where."""

import os
from typing import NamedTuple

from server.config.secrets import hash_key

_KEY_DIGITS = 4
_HASH_PREFIX = "sha256:"


class Actor(NamedTuple):
    """Where an act comes from. An empty field isn't known, and isn't written."""

    who: str = ""
    """`admin`, `host` for whoever controls the process, or the name of a tenant."""
    key: str = ""
    """The beginning of its key's hash."""
    source: str = ""
    """The address of the peer: of the proxy, where there is one."""
    request_id: str = ""


HOST = Actor("host", source=f"uid={os.getuid()}")
"""Who starts and stops the server, and changes its files."""


def key_name(key: str) -> str:
    """Return the beginning of a key's hash, by which the key is found in a tenants' file.

    It is short, since a refused key may be a password typed at the wrong place: nobody can tell by
    16 bits which of all likely passwords it is.
    """
    return hash_key(key)[: len(_HASH_PREFIX) + _KEY_DIGITS] if key else ""
