"""Reads files of the configuration again while the server runs: on SIGHUP, or when they change."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from server.config.base import ConfigError

logger = logging.getLogger(__name__)

_POLL_S = 1.0


class Reloadable(Protocol):
    """A part of the configuration whose files may change while the server runs."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files."""

    def read(self) -> Any:
        """Return what the files hold; called in a thread.

        Raises:
            ConfigError: the files can't be used.
        """

    def use(self, read: Any) -> None:
        """Put into effect what `read` returned."""


class Reloads:
    """Watches files. Those that can't be used are logged, and change nothing.

    Args:
        parts: the parts of the configuration whose files are watched.
        interval_s: seconds between two looks at the files.
    """

    def __init__(self, parts: Sequence[Reloadable], interval_s: float = _POLL_S) -> None:
        self._interval_s = interval_s
        self._seen = {part: _state(part) for part in parts if part.files}
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Request that all files are read again now."""
        self._asked.set()

    async def watch(self) -> None:
        """Read files when they change or on request, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._asked.wait()
            except TimeoutError:
                pass
            all_of_them = self._asked.is_set()
            self._asked.clear()
            for part, seen in list(self._seen.items()):
                # In a thread, since a network's folder may be slow.
                state = await asyncio.to_thread(_state, part)
                if all_of_them or state != seen:
                    self._seen[part] = state
                    await _read(part)


async def _read(part: Reloadable) -> None:
    names = ", ".join(map(str, part.files))
    try:
        part.use(await asyncio.to_thread(part.read))
    except ConfigError as exc:
        for mistake in exc.mistakes:
            logger.error("%s can't be used, and changes nothing: %s", names, mistake)
    except Exception:
        # A running server must survive any file.
        logger.exception("%s can't be used, and changes nothing", names)
    else:
        logger.info("read %s again", names)


def _state(part: Reloadable) -> list[tuple[int, int, int] | None]:
    """Return a value that differs once a file has changed."""
    return [_stamp(file) for file in part.files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
