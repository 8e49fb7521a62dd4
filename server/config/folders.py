"""The cache folder, the engines' folders, and the log line about a folder that is made."""

import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from server.config.base import ConfigError

logger = logging.getLogger(__name__)

ENGINE_SOCKET = "engine.sock"
"""Name of the socket in an engine's folder."""
NO_HOME = "this user has no home folder, and neither HOME nor XDG_CACHE_HOME is set"
"""Why there is no cache folder."""
SOCKET_PATH_BYTES = 107
"""Longest path of a socket: Linux's `sockaddr_un`, without the final zero."""


def log_if_new(field: str, folder: Path) -> None:
    """Log that a folder will be made, since its path in `field` may be a slip.

    The cache folder is a default, and so no slip.
    """
    caches = cache_folder()
    # A folder that can't be read is reported when it is made.
    with suppress(OSError):
        if not folder.exists() and not (caches and folder.is_relative_to(caches)):
            there = next((each for each in folder.parents if each.exists()), folder)
            logger.info("%s: makes %s in %s", field, folder.relative_to(there), there)


def has_home() -> bool:
    """Return whether this user has a home folder; in containers some have none."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def new_engine_folder() -> Path:
    """Return a new path for an engine's folder, which isn't made yet.

    Raises:
        ConfigError: there is no folder for temporary files, or its path is too long for a socket.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"tierserve-{secrets.token_hex(8)}")
    except OSError as exc:
        raise ConfigError(["TMPDIR: should be a folder that we can write"]) from exc
    if not is_socket_path(folder / ENGINE_SOCKET):
        raise ConfigError([f"TMPDIR: should be shorter, for a socket in it, not {folder.parent}"])
    return folder


def is_socket_path(path: Path) -> bool:
    """Return whether a path is short enough for a socket."""
    return len(os.fsencode(path)) <= SOCKET_PATH_BYTES


def cache_folder() -> Path | None:
    """Return the folder of the models and, by default, of the disk tier.

    There is none where this user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with suppress(RuntimeError):
        return Path(base).expanduser() / "tierserve"
    return None
