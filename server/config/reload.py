"""Files of the configuration that are read again while we run: on SIGHUP, or when they change."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from server.config.base import ConfigError

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


class Reloadable(Protocol):
    """What files say that may change while we run."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files."""

    def read(self) -> Any:
        """Return what they say now; called in a thread.

        Raises:
            ConfigError: that can't be used.
        """

    def use(self, read: Any) -> None:
        """Go on with what `read` returned."""


class Reloads:
    """Watches files; those that are wrong are said in the log, and what they said before stays.

    Args:
        parts: what the files are of.
        every_s: seconds between two looks at them.
    """

    def __init__(self, parts: Sequence[Reloadable], every_s: float = _LOOK_S) -> None:
        self._every_s = every_s
        self._seen = {part: _state(part) for part in parts if part.files}
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Have all files read again now."""
        self._asked.set()

    async def watch(self) -> None:
        """Read files when they change or that is asked for, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._every_s):
                    await self._asked.wait()
            except TimeoutError:
                pass
            all_of_them = self._asked.is_set()
            self._asked.clear()
            for part, seen in list(self._seen.items()):
                # A folder over a network may take its time.
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
            logger.error("%s can't be used, and what was read before stays: %s", names, mistake)
    except Exception:
        # No file is worth the end of a server that runs.
        logger.exception("%s can't be used, and what was read before stays", names)
    else:
        logger.info("read %s again", names)


def _state(part: Reloadable) -> list[tuple[int, int, int] | None]:
    """Return what changes when a file does."""
    return [_stamp(file) for file in part.files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
