"""Reads files of the configuration again while the server runs: on SIGHUP, or when they change."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.config.base import ConfigError
from server.config.changes import take_over
from server.config.load import load
from server.config.schema import Config

logger = logging.getLogger(__name__)

_POLL_S = 1.0
ReadNote = Callable[[Sequence[Path], str, Sequence[str]], Awaitable[None]]
"""Is told of files that were read again, why, and which mistakes are in them."""


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

    A file that has changed is read once it stays the same for an interval: what somebody has half
    written may be valid, too.

    Args:
        parts: the parts of the configuration whose files are watched.
        note: is told what was read.
        interval_s: seconds between two looks at the files.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        parts: Sequence[Reloadable],
        note: ReadNote,
        interval_s: float = _POLL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._note, self._interval_s, self._clock = note, interval_s, clock
        self._read = {part: _state(part) for part in parts if part.files}
        self._seen = {**self._read}
        self._asked = asyncio.Event()
        self._failed: set[Reloadable] = set()
        self.succeeded_at = clock()
        """When all files were last known to be right (Unix s)."""

    @property
    def is_successful(self) -> bool:
        """Whether all files could be used when they were read last."""
        return not self._failed

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
            for part, read in list(self._read.items()):
                # In a thread, since a network's folder may be slow.
                state = await asyncio.to_thread(_state, part)
                is_settled, self._seen[part] = state == self._seen[part], state
                if all_of_them or (state != read and is_settled):
                    self._read[part] = state
                    await self._use(part, "they changed" if state != read else "SIGHUP")

    async def _use(self, part: Reloadable, cause: str) -> None:
        mistakes = await _read(part)
        (self._failed.add if mistakes else self._failed.discard)(part)
        if self.is_successful:
            self.succeeded_at = self._clock()
        await self._note(part.files, cause, mistakes)


async def _read(part: Reloadable) -> Sequence[str]:
    """Use the files of a part; returns the mistakes in them."""
    names = ", ".join(map(str, part.files))
    try:
        part.use(await asyncio.to_thread(part.read))
    except ConfigError as exc:
        for mistake in exc.mistakes:
            logger.error("%s can't be used, and changes nothing: %s", names, mistake)
        return exc.mistakes
    except Exception as exc:
        # A running server must survive any file.
        logger.exception("%s can't be used, and changes nothing", names)
        return [type(exc).__name__]
    logger.info("read %s again", names)
    return []


def _state(part: Reloadable) -> list[tuple[int, int, int] | None]:
    """Return a value that differs once a file has changed."""
    return [_stamp(file) for file in part.files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class Followed:
    """A part of the configuration that others take over once it has been read; a `Reloadable`.

    Args:
        part: what is read.
        then: gets what was read, after `part` has put it into effect.
    """

    def __init__(self, part: Reloadable, then: Callable[[Any], None]) -> None:
        self._part, self._then = part, then

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files."""
        return self._part.files

    def read(self) -> Any:
        """Return what they hold."""
        return self._part.read()

    def use(self, read: Any) -> None:
        """Use what `read` returned, here and there."""
        self._part.use(read)
        self._then(read)


class RunningConfig:
    """The configuration that runs; what can change of it does when its file changes.

    It is a `Reloadable`.

    Args:
        file: holds it.
        config: what was read of it at the start.
        then: puts a configuration into effect, in which only fields have changed that can.
    """

    def __init__(self, file: Path, config: Config, then: Callable[[Config], None]) -> None:
        self._file, self._then = file, then
        # What a pipe held is gone, and an empty file would be a configuration, too.
        self._files = (file,) if file.is_file() else ()
        self.now = config
        """As it is in effect."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its file; none if it is a pipe."""
        return self._files

    def read(self) -> Config:
        """Return what the file and the environment hold now.

        Raises:
            ConfigError: the file can't be read, or has mistakes.
        """
        # An empty one would stand for all defaults, and is about to be written, rather.
        return load(self._file, may_be_empty=False)

    def use(self, read: Config) -> None:
        """Put into effect what can change now, and log the names of what does and what doesn't."""
        merged, (taken, waiting) = take_over(self.now, read)
        if taken:
            self._then(merged)
            self.now = merged
            logger.info("changed: %s", ", ".join(taken))
        for path in waiting:
            logger.warning("%s: changes at the next start", path)


class ReloadCollector(Collector):
    """Reports to Prometheus how the last reloads went, as Prometheus does of its own.

    Args:
        reloads: of this process.
    """

    def __init__(self, reloads: Reloads) -> None:
        self._reloads = reloads

    def collect(self) -> Iterable[Metric]:
        successful = GaugeMetricFamily(
            "tierserve_config_last_reload_successful",
            "0 while a file of the configuration can't be used, and the last right one holds",
        )
        successful.add_metric((), self._reloads.is_successful)
        at = GaugeMetricFamily(
            "tierserve_config_last_reload_success_timestamp_seconds",
            "When all files of the configuration were last read without a mistake, or the start",
        )
        at.add_metric((), self._reloads.succeeded_at)
        return successful, at
