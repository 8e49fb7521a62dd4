"""Folders that are made: those that the configuration names, and each engine's own."""

import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from server.config.base import (
    ConfigError,
)  # fmt: skip

logger = logging.getLogger(__name__)

ENGINE_SOCKET = "engine.sock"
"""In an engine's folder."""


def log_if_new(field: str, folder: Path) -> None:
    """Log that a folder is about to be made, which may be a slip of who wrote `field`.

    Nobody wrote the cache folder.
    """
    caches = cache_folder()
    # What can't be looked at can't be made, which is said when that is tried.
    with suppress(OSError):
        if not folder.exists() and not (caches and folder.is_relative_to(caches)):
            there = next((each for each in folder.parents if each.exists()), folder)
            logger.info("%s: makes %s in %s", field, folder.relative_to(there), there)


def has_home() -> bool:
    """Return whether this user has a home folder; one without a name, as in a container, hasn't."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def new_engine_folder() -> Path:
    """Return where an engine's socket can be; the folder isn't made yet.

    Raises:
        ConfigError: there is no folder for temporary files, or it has too long a path.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"tierserve-{secrets.token_hex(8)}")
    except OSError as exc:
        raise ConfigError(["TMPDIR: should be a folder that we can write"]) from exc
    if not is_socket_path(folder / ENGINE_SOCKET):
        raise ConfigError([f"TMPDIR: should be shorter, for a socket in it, not {folder.parent}"])
    return folder


_SOCKET_PATH_BYTES = 107
"""Of Linux's sockaddr_un, without the final zero."""


def is_socket_path(path: Path) -> bool:
    """Whether the path is short enough for a socket."""
    return len(os.fsencode(path)) <= _SOCKET_PATH_BYTES


NO_HOME = "this user has no home folder, and neither HOME nor XDG_CACHE_HOME is set"
"""Why there is no cache folder."""


def cache_folder() -> Path | None:
    """Return the folder for what can be made again: models and, by default, the disk tier.

    There is none where this user has no home, as in a container whose user has no name.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with suppress(RuntimeError):
        return Path(base).expanduser() / "tierserve"
    return None
